"""What the Triton engine holds: the formula against what operators allocate, and its limits at the shapes of models."""

import pytest
import torch

from tests.live_memory import LiveMemory, uncounted
from xhead.engines import class_order, operands, slices, tile_means, triton_memory
from xhead.engines import triton as engine
from xhead.engines.problem import FilterOptions, Problem
from xhead.engines.triton_memory import dense_bytes, sparse_bytes

pytest.importorskip("triton")

GEMMA = (8192, 256000, 2304)
SHARES = (0.05, 0.2, engine.DENSE_SHARE)


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    class_order.clear()
    monkeypatch.setattr(class_order, "learn", lambda *_: None)
    monkeypatch.setattr(engine, "DENSE_SHARE", 1.0)
    for module in (tile_means, slices):
        monkeypatch.setattr(module, "multiply", uncounted(module.multiply))
    monkeypatch.setattr(slices, "multiply_add", uncounted(slices.multiply_add))


def held(rows, classes, size, dtype, threshold, monkeypatch, **options):
    """Most bytes that forward and backward hold at a time beside the gradients, and the share of active tiles."""
    hidden, weight = torch.randn(rows, size), torch.randn(classes, size)
    weight *= torch.linspace(2.0, 0.02, classes)[:, None]  # the first classes are the likely ones
    hidden, weight, target = hidden.to(dtype), weight.to(dtype), torch.randint(classes, (rows,))
    problem = Problem(
        hidden, weight, ("lse", "target"), target=target, filter=FilterOptions(threshold=threshold, **options)
    )
    shares = []
    add_gradients = engine.ActiveTiles.add_gradients
    monkeypatch.setattr(
        engine.ActiveTiles,
        "add_gradients",
        lambda tiles, *arguments: (shares.append(tiles.share), add_gradients(tiles, *arguments))[1],
    )
    with LiveMemory(hidden, weight, target) as memory:
        results, state = engine.forward(problem, True)
        upstream = {"lse": torch.ones(rows), "target": -torch.ones(rows)}
        gradients = engine.backward(problem, results, state, upstream, (True, True, False))
    return memory.peak(*gradients[:2]), shares[0] if shares else None, operands.blocks_for(problem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators' own allocations are counted, on a CPU")
@pytest.mark.parametrize(
    ("size", "dtype", "compensate"),
    [(64, torch.bfloat16, True), (300, torch.bfloat16, True), (64, torch.float16, False)],
)
def test_active_tiles_hold_what_is_stated(size, dtype, compensate, monkeypatch):
    threshold = 2.0**-4 if size == 64 else 2.0**-1
    counted, share, blocks = held(130, 1100, size, dtype, threshold, monkeypatch, compensate=compensate)
    stated = sparse_bytes(130, 1100, size, blocks, dtype, share=share, compensate=compensate)
    assert 0 < share < 0.6
    assert stated <= counted + 1000
    assert counted <= 1.06 * stated


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators' own allocations are counted, on a CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slices_hold_what_is_stated(dtype, monkeypatch):
    monkeypatch.setattr(triton_memory, "PRODUCTS_BYTES", 1 << 18)
    counted, share, blocks = held(130, 1100, 64, dtype, 0.0, monkeypatch)
    stated = dense_bytes(130, 1100, 64, blocks, dtype, recorded=False)
    assert share is None
    assert stated <= counted + 1000
    assert counted <= 1.06 * stated


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("major", [8, 9, 10])
def test_limits_at_the_size_of_a_model(major, capped):
    blocks = operands.kernels("blocks").blocks_of(torch.bfloat16, major, capped=capped)
    for share in SHARES:
        # With the order of the classes that is remembered.
        assert sparse_bytes(*GEMMA, blocks, torch.bfloat16, share=share) + 8 * GEMMA[1] <= 64e6
    assert dense_bytes(*GEMMA, blocks, torch.bfloat16) <= 512e6
