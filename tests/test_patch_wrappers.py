"""A patched model in two and four processes against one: FSDP1, FSDP2 resharded, split sequences, and the Trainer."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import xhead
from tests.dense import relative_error
from tests.processes import in_processes
from tests.test_trainer import train
from tests.tiny import tiny, tokens, twins
from xhead.projection import CutLinear

RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


def _full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _fsdp1(model, mesh, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, **options)


def _fsdp2(model, mesh, apart=False, **options):
    if apart:
        fully_shard(model.lm_head, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _fsdp2_in_a_group(model, mesh):
    """As accelerate does it: the last norm and the head in one group, with the embeddings where they are tied."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    group = [model.model.norm, *([model.model.embed_tokens] if tied else []), model.lm_head]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(group, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "FSDP1": _fsdp1,
    "FSDP2, resharded": lambda m, mesh: _fsdp2(m, mesh, reshard_after_forward=True),
    "FSDP2, not resharded": lambda m, mesh: _fsdp2(m, mesh, reshard_after_forward=False),
    "FSDP2, head apart, not resharded": lambda m, mesh: _fsdp2(m, mesh, True, reshard_after_forward=False),
    "FSDP2, head in a group": _fsdp2_in_a_group,
}


def _gradients(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): None if each.grad is None else each.grad.clone()
                for name, each in model.named_parameters()
            }
    return {name: None if each.grad is None else _full(each.grad) for name, each in model.named_parameters()}


def _wrap(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    for tied in (False, True):
        for name, wrap in WRAPPERS.items():
            if tied and "apart" in name:
                continue
            plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
            wrapped = wrap(xhead.patch(model), mesh)
            for micro_batch in range(2):  # accumulated
                for seed in range(ranks):
                    (plain(**tokens(seed=ranks * micro_batch + seed)).loss / ranks).backward()
                wrapped(**tokens(seed=ranks * micro_batch + rank)).loss.backward()
            found = _gradients(wrapped)
            for key, parameter in plain.named_parameters():
                assert relative_error(found[key], parameter.grad) <= 1e-5, (name, key)
            status = xhead.status(model)
            assert (status.cut, status.materialized) == (2, 0), (name, status)


def _wrap_head_alone_in_fsdp1():
    model = xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=False))
    wrapped = _fsdp1(model, None, auto_wrap_policy=ModuleWrapPolicy({CutLinear}))
    with pytest.raises(RuntimeError, match="the output projection is a .*FullyShardedDataParallel"):
        wrapped(**tokens())


def _split_sequences(rank, ranks):
    """Context parallel, accumulated: each process has a part of every sequence, and labels shifted before the split."""
    plain, model = twins("LlamaForCausalLM", num_hidden_layers=0)  # no attention, which would look across the halves
    xhead.patch(model)
    batches = [tokens(seed=seed) for seed in range(2)]
    batches[1]["labels"][:, :7] = -100
    shifted = [F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] for batch in batches]
    count = sum((each != -100).sum() for each in shifted)
    width = 12 // ranks
    own_part = slice(width * rank, width * (rank + 1))
    total = torch.zeros(2)
    for batch, labels in zip(batches, shifted, strict=True):
        expected = plain(**batch, num_items_in_batch=count).loss
        expected.backward()
        own = {name: each[:, own_part].contiguous() for name, each in batch.items()}
        loss = model(**own, shift_labels=labels[:, own_part].contiguous(), num_items_in_batch=count).loss
        loss.backward()
        total += torch.stack([loss.detach(), expected.detach() / ranks])
    for each in (total, *(parameter.grad for parameter in model.parameters())):
        dist.all_reduce(each)
    assert relative_error(total[0], total[1]) <= 1e-5
    for (name, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) <= 1e-5, name
    assert xhead.status(model).materialized == 0


def _train(rank, ranks, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    model = xhead.patch(tiny("LlamaForCausalLM").eval())
    _, curve = train(
        model,
        folder,
        per_device_train_batch_size=4 // ranks,
        gradient_accumulation_steps=2,
        average_tokens_across_devices=True,
    )
    if rank == 0:
        torch.save((curve, model.state_dict()), f"{folder}/trained.pt")


def _all(rank, ranks, folder):
    _wrap(rank, ranks)
    _wrap_head_alone_in_fsdp1()
    _split_sequences(rank, ranks)
    _train(rank, ranks, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", RANKS)
def test_as_one_process(ranks, tmp_path):
    """The rows of the Trainer's processes, in a micro-batch of one process, count different tokens."""
    in_processes(_all, ranks, tmp_path, ranks, str(tmp_path))
    curve, trained = torch.load(tmp_path / "trained.pt")
    model = xhead.patch(tiny("LlamaForCausalLM").eval())
    _, expected = train(model, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-3, atol=1e-4)
