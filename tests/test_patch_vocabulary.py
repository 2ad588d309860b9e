"""A model that transformers has split over processes by its own tensor-parallel plan, patched."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import xhead
from tests.dense import relative_error
from tests.processes import GATHER, counted, in_processes
from tests.tiny import tokens, twins

RANKS = 2
LOSSES = [
    ("cce", {}),
    ("focal", {"gamma": 1.5}),
    ("cce+0.3*ntl_was", {"token_ids": list(range(10, 20)), "values": list(range(10))}),
    ("zloss", {}),
    ("cosface", {"scale": 8.0}),
]


def _full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _train(rank, folders):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    for folder in folders:
        batch = tokens()
        for name, options in LOSSES if folder == folders[0] else LOSSES[:1]:
            plain = xhead.patch(LlamaForCausalLM.from_pretrained(folder), loss=name, **options)
            model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
            assert isinstance(model.lm_head.weight, DTensor)
            stock_forward = model.lm_head.forward
            xhead.patch(model, loss=name, **options)
            for step in range(2):
                for each in (plain, model):
                    each.zero_grad()
                expected = plain(**batch).loss
                with counted() as forward:
                    output = model(**batch)
                torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
                assert isinstance(output.logits, xhead.LazyLogits)
                expected.backward()
                with counted() as backward:
                    output.loss.backward()
                if step and name == "cce":
                    # The model's own layers go by DTensor's collectives, which are not among these.
                    assert [each for each, _ in forward] == [GATHER]
                    assert [each for each, _ in backward] == ["all_reduce"]
            for (key, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
                assert relative_error(_full(ours.grad), theirs.grad) <= 1e-5, (name, key)
            status = xhead.status(model)
            assert (status.cut, status.materialized) == (2, 0), status
            with torch.no_grad():
                torch.testing.assert_close(_full(model(**batch).logits), plain(**batch).logits)
            xhead.unpatch(model)
            assert model.lm_head.forward is stock_forward
            torch.testing.assert_close(_full(model(**batch).loss), xhead.unpatch(plain)(**batch).loss)


def _train_in_half_precision(folder):
    """As one process under autocast: the same operands, and sums of rounded numbers in another order."""
    batch = tokens()
    plain = xhead.patch(LlamaForCausalLM.from_pretrained(folder))
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    xhead.patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [each(**batch).loss for each in (plain, model)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    for loss in losses:
        loss.backward()
    for (key, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert relative_error(_full(ours.grad), theirs.grad) <= 3e-2, key
    assert xhead.status(model).materialized == 0


def _save(folder, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _two(rank, folders):
    _train(rank, folders)
    _train_in_half_precision(folders[0])


@pytest.mark.filterwarnings("ignore")
def test_tensor_parallel_plan(tmp_path):
    folders = [_save(tmp_path / f"tied-{tied}", tied) for tied in (False, True)]
    in_processes(_two, RANKS, tmp_path, folders)


def _train_split_both_ways(rank):
    """Groups of two that share the classes, each group with rows of its own, and FSDP2 over the groups."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    for seed in range(2):
        (plain(**tokens(seed=seed)).loss / 2).backward()
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight, mesh["classes"], [Shard(0)]))
    fully_shard(xhead.patch(model), mesh=mesh["rows"])
    loss = model(**tokens(seed=rank // 2)).loss
    torch.testing.assert_close(loss, plain(**tokens(seed=rank // 2)).loss, rtol=1e-5, atol=0)
    loss.backward()
    for (key, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert relative_error(_full(ours.grad), theirs.grad) <= 1e-5, key
    status = xhead.status(model)
    assert (status.cut, status.materialized) == (1, 0), status


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_classes_and_rows_are_both_split(tmp_path):
    in_processes(_train_split_both_ways, 4, tmp_path)
