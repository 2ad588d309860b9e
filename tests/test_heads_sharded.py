"""Heads in the projection's place in two processes: data parallel and sharded, and a mapping that all agree on."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import xhead
from tests.test_patch_sharded import RANKS, WRAPPERS, _full
from tests.tiny import tiny, tokens


def _patched(**options):
    torch.manual_seed(3)
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False).eval()
    return xhead.patch(model, head="vq", codebook_size=12, start="random", token_bias="learned", **options)


def _train(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for name, wrap in WRAPPERS.items():
            plain = _patched()
            model = wrap(copy.deepcopy(plain), mesh)
            for seed in range(RANKS):
                (plain(**tokens(seed=seed)).loss / RANKS).backward()
            loss = model(**tokens(seed=rank)).loss
            torch.testing.assert_close(loss, plain(**tokens(seed=rank)).loss)
            loss.backward()
            for (key, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(
                    _full(actual.grad), expected.grad, msg=lambda text, k=key, n=name: f"{n} {k} {text}"
                )
        model = _patched(mapping="reassigned", reassign_every=2).train()
        before = model.lm_head.token_code.clone()
        parallel = WRAPPERS["data parallel"](model, mesh)
        for step in range(3):
            parallel(**tokens(seed=RANKS * step + rank)).loss.backward()
        codes = [torch.empty_like(before) for _ in range(RANKS)]
        dist.all_gather(codes, model.lm_head.token_code)
        assert torch.equal(codes[0], codes[1])
        assert not torch.equal(codes[0], before)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=RANKS)
