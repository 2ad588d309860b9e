"""What the forward of the Triton engine leaves of each tile: nothing that counts is skipped, and masses are right."""

import math

import pytest
import torch

from xhead.engines import class_order
from xhead.engines import triton as engine
from xhead.engines.operands import blocks_for, kernels
from xhead.engines.problem import FilterOptions, Problem

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read(spread, offset, threshold):
    """Active tiles, mass of the others a tile and a row, as recorded and as it is."""
    class_order.clear()
    hidden, weight = torch.randn(200, 32, device=DEVICE), spread * torch.randn(1500, 32, device=DEVICE)
    bias = offset + torch.linspace(2.0, -4.0, 1500, device=DEVICE)
    problem = Problem(hidden, weight, ("lse",), bias=bias, filter=FilterOptions(threshold=threshold))
    results, (*_, codes, reference, order) = engine.forward(problem, True)
    blocks = blocks_for(problem)
    active, block_mass, row_mass, moment = kernels("tile_record").read_record(
        codes, reference, results["lse"], math.log(threshold), 1500, blocks
    )
    logits = (hidden.double() @ weight.double().T + bias.double())[:, order.long()]
    p = torch.nn.functional.pad(logits.softmax(1), (0, -1500 % blocks.classes, 0, -200 % blocks.rows))
    tiles = p.view(active.shape[0], blocks.rows, active.shape[1], blocks.classes)
    skipped = (tiles.sum(3) * ~active[:, None]).flatten(0, 1)[:200]
    lse = logits.logsumexp(1, keepdim=True)
    sizes = torch.full((active.shape[1],), blocks.classes, device=DEVICE)
    sizes[-1] = 1500 - blocks.classes * (active.shape[1] - 1)
    exact_moment = torch.xlogy(skipped, skipped / sizes) + skipped * lse
    return active, tiles.amax((1, 3)), (block_mass, skipped.sum(0)), (row_mass, skipped.sum(1)), (moment, exact_moment)


@pytest.mark.parametrize(
    ("spread", "offset", "threshold"),
    [(0.05, 0.0, 2**-9), (0.5, -3000.0, 2**-7), (0.5, 3000.0, 2**-7), (3.0, 0.0, 2**-6), (3.0, 0.0, 2**-20)],
)
def test_no_entry_above_the_threshold_is_skipped(spread, offset, threshold):
    active, largest, *_ = read(spread, offset, threshold)
    assert active[largest >= threshold].all()
    if spread < 1:  # rows further apart have logits so far above the reference that they are not told apart
        assert not active[largest < 0.96 * threshold].any()


def test_masses_of_skipped_tiles():
    active, _, blocks, rows, (moment, exact) = read(0.3, 0.0, 2**-7)
    assert 0 < active.float().mean() < 1
    for found, true in (blocks, rows):
        assert (found - true).norm() < 0.1 * true.norm()
        assert abs(found.sum() / true.sum() - 1) < 0.01
    assert abs(moment.sum() / exact.sum() - 1) < 0.01


def test_masses_of_rows_that_are_nearly_uniform():
    """Every tile of the same shape: rounding them all alike would be wrong by the same factor everywhere."""
    _, _, (found, true), (row_found, row_true), _ = read(1e-3, 0.0, 0.5)
    assert (found / true - 1).abs().max() < 0.03
    assert (row_found / row_true - 1).abs().max() < 0.1
    assert abs(row_found.sum() / row_true.sum() - 1) < 0.01
