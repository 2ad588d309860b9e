"""Heads in the projection's place in two and four processes: data parallel, sharded; a mapping that all agree on."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import xhead
from tests.processes import in_forks
from tests.test_patch_sharded import RANKS, WRAPPERS, _full
from tests.tiny import tiny, tokens

HEADS = {
    "vq": {"codebook_size": 12, "start": "random", "token_bias": "learned"},
    "fourier": {"num_frequencies": 5, "token_range": (10, 50), "regularization": 1e-3, "init_scale": 1.0},
}


def _shard_layers_of_the_head(model, mesh):
    for layer in model.lm_head.children():
        fully_shard(getattr(layer, "linear", layer), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _shard_in_a_group(model, mesh):
    """As accelerate does it."""
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {**WRAPPERS, "layers of the head apart": _shard_layers_of_the_head, "in a group": _shard_in_a_group}


def _patched(head="vq", **options):
    torch.manual_seed(3)
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False).eval()
    return xhead.patch(model, head=head, **HEADS[head], **options)


def _train(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        for head, (name, wrap) in itertools.product(HEADS, WRAPPERS.items()):
            plain = _patched(head)
            model = wrap(copy.deepcopy(plain), mesh)
            for seed in range(ranks):
                (plain(**tokens(seed=seed)).loss / ranks).backward()
            loss = model(**tokens(seed=rank)).loss
            torch.testing.assert_close(loss, plain(**tokens(seed=rank)).loss)
            loss.backward()
            for (key, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(
                    _full(actual.grad), expected.grad, msg=lambda text, k=key, n=(head, name): f"{n} {k} {text}"
                )
        model = _patched(mapping="reassigned", reassign_every=2).train()
        before = model.lm_head.token_code.clone()
        parallel = WRAPPERS["data parallel"](model, mesh)
        for step in range(3):
            parallel(**tokens(seed=ranks * step + rank)).loss.backward()
        codes = [torch.empty_like(before) for _ in range(ranks)]
        dist.all_gather(codes, model.lm_head.token_code)
        assert all(torch.equal(codes[0], each) for each in codes)
        assert not torch.equal(codes[0], before)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", RANKS)
def test_as_one_process(ranks, tmp_path):
    torch.multiprocessing.spawn(_train, (ranks, str(tmp_path)), nprocs=ranks)


def _train_split(rank, folder):
    """The layers are split as transformers plans it; every process has the whole head."""
    split = DistributedConfig(tp_plan="auto")
    for head in HEADS:
        plain = _patched(head)
        model = xhead.load(f"{folder}/{head}", distributed_config=split).eval()
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
        assert not any(isinstance(parameter, DTensor) for parameter in model.lm_head.parameters())
        losses = [each(**tokens()).loss for each in (plain, model)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for (key, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(
                _full(actual.grad), expected.grad, msg=lambda text, k=key, n=head: f"{n} {k} {text}"
            )
        model.save_pretrained(f"{folder}/{head} again", is_main_process=rank == 0)
    model = LlamaForCausalLM.from_pretrained(f"{folder}/linear", distributed_config=split)
    with pytest.raises(ValueError, match="'vq' starts from the output projection's whole weight"):
        xhead.patch(model, head="vq", codebook_size=4)
    assert not xhead.status(model).patched


@pytest.mark.filterwarnings("ignore")
def test_tensor_parallel(tmp_path):
    tiny("LlamaForCausalLM", tie_word_embeddings=False).save_pretrained(tmp_path / "linear")
    for head in HEADS:
        _patched(head).save_pretrained(tmp_path / head)
    in_forks(_train_split, 2, tmp_path, str(tmp_path))
    for head in HEADS:
        again = xhead.load(tmp_path / f"{head} again").eval()
        assert torch.equal(again(**tokens()).loss, _patched(head)(**tokens()).loss)
