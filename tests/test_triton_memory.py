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


def held(rows, classes, size, dtype, threshold, monkeypatch, ignored=False, smoothed=False, **options):
    """Most bytes that forward and backward hold at a time beside the gradients, and the share of active tiles."""
    names = ("lse", "target", "mean") if smoothed else ("lse", "target")
    mask = torch.arange(rows) != 5 if ignored else None
    hidden, weight = torch.randn(rows, size), torch.randn(classes, size)
    weight *= torch.linspace(2.0, 0.02, classes)[:, None]  # the first classes are the likely ones
    hidden, weight, target = hidden.to(dtype), weight.to(dtype), torch.randint(classes, (rows,))
    problem = Problem(
        hidden, weight, names, target=target, row_mask=mask, filter=FilterOptions(threshold=threshold, **options)
    )
    shares = []
    add_gradients = engine.ActiveTiles.add_gradients
    monkeypatch.setattr(
        engine.ActiveTiles,
        "add_gradients",
        lambda tiles, *arguments: (shares.append(tiles.share), add_gradients(tiles, *arguments))[1],
    )
    with LiveMemory(hidden, weight, target, mask) as memory:
        results, state = engine.forward(problem, True)
        upstream = dict(zip(names, (torch.ones(rows), -torch.ones(rows), torch.ones(rows)), strict=False))
        gradients = engine.backward(problem, results, state, upstream, (True, True, False))
    return memory.peak(*gradients[:2]), shares[0] if shares else None, operands.blocks_for(problem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators' own allocations are counted, on a CPU")
@pytest.mark.parametrize(
    ("size", "dtype", "options"),
    [
        (64, torch.bfloat16, {}), (300, torch.bfloat16, {}), (64, torch.float16, {"compensate": False}),
        (64, torch.bfloat16, {"ignored": True}), (300, torch.bfloat16, {"ignored": True, "smoothed": True}),
    ],
)  # fmt: skip
def test_active_tiles_hold_what_is_stated(size, dtype, options, monkeypatch):
    threshold = 2.0**-4 if size == 64 else 2.0**-1
    counted, share, blocks = held(130, 1100, size, dtype, threshold, monkeypatch, **options)
    stated = sparse_bytes(130, 1100, size, blocks, dtype, share=share, **options)
    assert 0 < share < 0.6
    assert stated <= counted + 1000
    assert counted <= 1.06 * stated


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators' own allocations are counted, on a CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [False, True])
def test_slices_hold_what_is_stated(dtype, ignored, monkeypatch):
    monkeypatch.setattr(triton_memory, "PRODUCTS_BYTES", 1 << 18)
    counted, share, blocks = held(130, 1100, 64, dtype, 0.0, monkeypatch, ignored=ignored, smoothed=ignored)
    stated = dense_bytes(130, 1100, 64, blocks, dtype, recorded=False, ignored=ignored)
    assert share is None
    assert stated <= counted + 1000
    assert counted <= 1.06 * stated


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("major", [8, 9, 10])
@pytest.mark.parametrize("ignored", [False, True])
def test_limits_at_the_size_of_a_model(major, capped, ignored):
    blocks = operands.kernels("blocks").blocks_of(torch.bfloat16, major, capped=capped)
    for share in SHARES:
        # With the order of the classes that is remembered.
        held = sparse_bytes(*GEMMA, blocks, torch.bfloat16, share=share, ignored=ignored, smoothed=True)
        assert held + 8 * GEMMA[1] <= 64e6
    assert dense_bytes(*GEMMA, blocks, torch.bfloat16, ignored=ignored) <= 512e6
