"""A loss of the logits that a model gives, taken outside of it, in two and four processes against one: FSDP."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor

import xhead
from tests.processes import in_processes
from tests.test_loss_outside import (
    ADAPTERS,
    RANKS,
    adapted,
    assert_as_one_process,
    assert_same_gradients,
    chunked_loss_of,
    loss_of,
    plain_loss_of,
    seeded,
)
from tests.test_patch_wrappers import WRAPPERS
from tests.tiny import tiny, twins


def fsdp2(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))

    def layers(model, mesh):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)

    for name, wrap in {**WRAPPERS, "FSDP2, layers, resharded": layers}.items():
        if name == "FSDP1":
            continue
        for tied in (False, True):
            if tied and "apart" in name:
                continue
            plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
            assert_as_one_process((name, tied), rank, ranks, wrap(xhead.patch(model), mesh), plain)


def fsdp2_resharded(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))

    def resharded(model, **options):
        return fully_shard(model, mesh=mesh, reshard_after_forward=True, **options)

    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    wrapped = resharded(xhead.patch(model))
    loss = loss_of(wrapped, 0)
    assert all(isinstance(each, DTensor) for each in wrapped.parameters())  # sharded until the backward
    loss.backward()
    assert all(isinstance(each, DTensor) for each in wrapped.parameters())

    for trained in ("lm_head.weight", "model.norm.weight"):
        plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
        for each in (plain, model):
            for name, parameter in each.named_parameters():
                parameter.requires_grad = name == trained
        assert_as_one_process(trained, rank, ranks, resharded(xhead.patch(model)), plain)

    plain, model = twins("LlamaForCausalLM")
    wrapped = resharded(xhead.patch(model))
    for step in range(2):
        wrapped.set_requires_gradient_sync(step == 1)
        for seed in range(ranks):
            (loss_of(plain, ranks * step + seed) / ranks).backward()
        loss_of(wrapped, ranks * step + rank).backward()
    assert_same_gradients("accumulated", wrapped, plain)

    plain, model = twins("LlamaForCausalLM")
    assert_as_one_process("chunked", rank, ranks, resharded(xhead.patch(model)), plain, chunked_loss_of)

    plain, model = twins("BertForMaskedLM", tie_word_embeddings=False)
    xhead.patch(model)
    resharded(model.cls)  # a module between the model and its head
    assert_as_one_process("between", rank, ranks, resharded(model), plain, plain_loss_of)

    for head, options in (("vq", {"codebook_size": 16, "start": "random"}), ("fourier", {"num_frequencies": 4})):
        pair = [xhead.patch(seeded(each), head=head, **options) for each in twins("LlamaForCausalLM")]
        assert_as_one_process(head, rank, ranks, resharded(pair[1]), pair[0], plain_loss_of)

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    pair = twins("LlamaForCausalLM")
    losses = [loss_of(resharded(each, mp_policy=half), rank) for each in (pair[0], xhead.patch(pair[1]))]
    torch.testing.assert_close(losses[1].float(), losses[0].float(), rtol=2**-7, atol=0)


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


def fsdp2_around(rank, ranks):
    """A module around the model is what FSDP2 shards; adapters call the model past its hooks."""
    mesh = init_device_mesh("cpu", (ranks,))
    for again in (True, False):
        pair = [Around(each) for each in twins("LlamaForCausalLM", tie_word_embeddings=False)]
        wrapped = fully_shard(xhead.patch(pair[1]), mesh=mesh, reshard_after_forward=again)
        assert_as_one_process(("around", again), rank, ranks, wrapped, pair[0])
        for form in ADAPTERS:
            pair = adapted(**form)
            wrapped = fully_shard(xhead.patch(pair[1]), mesh=mesh, reshard_after_forward=again)
            assert_as_one_process((form, again), rank, ranks, wrapped, pair[0])


def fsdp2_compiled(rank, ranks):
    plain, model = twins("LlamaForCausalLM", num_hidden_layers=1)
    sharded = fully_shard(xhead.patch(model), mesh=init_device_mesh("cpu", (ranks,)), reshard_after_forward=True)
    compiled = torch.compile(sharded, backend="eager")
    for seed in range(ranks):
        (loss_of(plain, seed) / ranks).backward()
    loss_of(compiled, rank).backward()
    assert_same_gradients("compiled", sharded, plain)


def sharded_for_good():
    """Nothing can be gathered here: the error names the cause and the fix."""
    for sharding in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        for original in (True, False):
            for head in ("linear", "vq"):
                options = {} if head == "linear" else {"codebook_size": 16, "start": "random"}
                model = xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=False), head=head, **options)
                wrapped = FullyShardedDataParallel(
                    model, device_id=torch.device("cpu"), use_orig_params=original, sharding_strategy=sharding
                )
                with pytest.raises(RuntimeError, match=r"outside of the model, where FSDP has sharded .* FSDP2"):
                    plain_loss_of(wrapped, 0)


def of_fsdp(rank, ranks):
    fsdp2(rank, ranks)
    fsdp2_resharded(rank, ranks)
    fsdp2_around(rank, ranks)
    if ranks == 2:
        fsdp2_compiled(rank, ranks)
        sharded_for_good()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", RANKS)
def test_as_one_process(ranks, tmp_path):
    in_processes(of_fsdp, ranks, tmp_path, ranks)
