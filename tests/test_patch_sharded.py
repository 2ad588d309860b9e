"""Patched models in two and four processes: data parallel, sharded, and with a head split over devices."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import xhead
from tests.tiny import tokens, twins

RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


def _shard_head_apart(model, mesh):
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def _shard_whole(model, mesh):
    return fully_shard(model, mesh=mesh)


def _data_parallel(model, mesh):
    return DistributedDataParallel(model)


WRAPPERS = {"sharded, head apart": _shard_head_apart, "sharded": _shard_whole, "data parallel": _data_parallel}


def _full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _train(rank, ranks, folder, tied):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        for name, wrap in WRAPPERS.items():
            if tied and "apart" in name:
                continue
            plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
            for seed in range(ranks):
                (plain(**tokens(seed=seed)).loss / ranks).backward()
            model = wrap(xhead.patch(model), mesh)
            loss = model(**tokens(seed=rank)).loss
            torch.testing.assert_close(loss, plain(**tokens(seed=rank)).loss)
            loss.backward()
            for (key, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(
                    _full(actual.grad), expected.grad, msg=lambda text, k=key, n=name: f"{n} {k} {text}"
                )
            status = xhead.status(model)
            assert (status.cut, status.materialized) == (1, 0), name
        _train_with_split_head(mesh, tied)
        _train_on_numbers(mesh, rank, tied)
        # A process that leaves while another still sends takes its threads away under it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train_with_split_head(mesh, tied):
    if tied:
        return
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    xhead.patch(model)
    split = ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate())
    parallelize_module(model, mesh, {"lm_head": split})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = model(**tokens()).loss
    assert any("split over devices" in str(warning.message) for warning in caught)
    torch.testing.assert_close(_full(loss), plain(**tokens()).loss)
    assert xhead.status(model).operations == {"DTensor weight": 1}


def _train_on_numbers(mesh, rank, tied):
    """A loss that reads rows of the weight beside the statistics."""
    numbers = {"token_ids": list(range(10, 50)), "values": [each % 10 for each in range(10, 50)]}
    text = "cce+0.3*ntl_was+0.2*ntl_number"
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
    for each in (plain, model):
        xhead.patch(each, loss=text, reweigh=True, **numbers)
    for seed in range(mesh.size()):
        (plain(**tokens(seed=seed)).loss / mesh.size()).backward()
    model = _shard_whole(model, mesh) if tied else _shard_head_apart(model, mesh)
    model(**tokens(seed=rank)).loss.backward()
    for (key, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(_full(actual.grad), expected.grad, msg=lambda text, k=key: f"{k} {text}")
    assert xhead.status(model).materialized == 0


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("tied", [False, True])
def test_as_one_process(tied, ranks, tmp_path):
    context = torch.multiprocessing.spawn(_train, args=(ranks, str(tmp_path), tied), nprocs=ranks, join=False)
    assert context is not None
    while not context.join(timeout=120):
        pass


def test_wrapped_model_is_patched_through(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **batch):
            return self.module(**batch)

    plain, model = twins("LlamaForCausalLM")
    wrapped = xhead.patch(Wrapper(copy.deepcopy(model)))
    torch.testing.assert_close(wrapped(**tokens()).loss, plain(**tokens()).loss)
    assert xhead.status(wrapped).cut == 1
