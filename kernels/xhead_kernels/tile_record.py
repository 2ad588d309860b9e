"""What the forward leaves of each row and tile in 16 bits: how large its largest logit is, and how much it holds.

Both are relative to a reference, which is the row's log-sum-exp over some of the classes and so at most that over all.
The largest logit takes 11 bits, rounded up: a tile that holds an entry of at least the threshold is never taken for one
that does not. The tile's log-sum-exp above it takes 5 bits, rounded up or down by turns that depend on the row and the
tile: a single mass is off by up to a fifth, either way, and sums over a row's tiles or a tile's rows by little.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import Blocks, ceil_divide

_STEPS = tl.constexpr(64)  # of the largest logit, to one of the logarithm
_BELOW = tl.constexpr(20 * 64)  # steps below the reference; what is lower holds nothing that counts
_UNKNOWN = tl.constexpr(2047)  # too large to say, or NaN: the tile is active
_EXCESS = tl.constexpr(0.185)  # a step of the log-sum-exp above the largest logit: 30 of them are log(256)
_MARGIN = tl.constexpr(0.25)  # steps added before rounding up, for what float32 rounds on the way
_GROUP = 32  # tiles of a program
_LAUNCH: dict[str, Any] = {"GROUP": _GROUP, "num_warps": 4}


@triton.jit
def encoded(peak, total, reference, row, tile):
    """int16. total: `sum exp(logit - peak)` over the tile"""
    steps = tl.ceil((peak - reference) * _STEPS + _MARGIN) + _BELOW
    # Written so that NaN is unknown.
    steps = tl.where(steps < _UNKNOWN, tl.where(steps > 0, steps, 0.0), 2047.0)
    # Multiples of these two numbers fill the unit square evenly, modulo 1.
    turn = row.to(tl.float32) * 0.7548776662 + tl.cast(tile, tl.float32) * 0.569840291
    excess = tl.log(tl.where(total > 0, total, 1.0)) / _EXCESS + (turn - tl.floor(turn))
    excess = tl.where(excess < 31, tl.where(excess > 0, excess, 0.0), 31.0)
    return (steps.to(tl.int32) * 32 + excess.to(tl.int32) - 32768).to(tl.int16)


@triton.jit
def log_peak(code, reference, lse):
    """The logarithm of the largest probability, rounded up. code: a record + 32768"""
    return reference - lse + ((code >> 5) - _BELOW).to(tl.float32) / _STEPS


@triton.jit
def is_active(code, reference, lse, bound):
    """Whether an entry may be at least the threshold, whose logarithm is `bound`; NaN is."""
    return ((code >> 5) == _UNKNOWN) | ~(log_peak(code, reference, lse) < bound)


@triton.jit
def log_mass_of(code, reference, lse):
    """The logarithm of the tile's share of the row."""
    # Rounding up has added half a step, and the margin, on average.
    log_mass = log_peak(code, reference, lse) - (0.5 + _MARGIN) / _STEPS + (code & 31).to(tl.float32) * _EXCESS
    return tl.where(code >= 32, log_mass, float("-inf"))


@triton.jit
def _read_kernel(
    record,  # (tiles, N)
    reference,  # (N,)
    lse,  # (N,)
    active_out,  # (row blocks, tiles)
    block_mass_out,  # (row blocks, tiles)
    row_mass_out,  # (groups, N)
    row_moment_out,  # (groups, N)
    bound,
    rows,
    classes,
    tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, group = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    row_reference = tl.load(reference + row, mask=inside, other=0.0)
    row_lse = tl.load(lse + row, mask=inside, other=0.0)
    row_mass = tl.zeros((BLOCK_N,), dtype=tl.float32)
    row_moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(group * GROUP, tl.minimum((group + 1) * GROUP, tiles)):
        code = tl.load(record + tl.cast(tile, tl.int64) * rows + row, mask=inside, other=-32768).to(tl.int32) + 32768
        visited = tl.max((is_active(code, row_reference, row_lse, bound) & inside).to(tl.int32), 0)
        log_mass = log_mass_of(code, row_reference, row_lse)
        mass = tl.where(inside & (visited == 0), tl.exp(log_mass), 0.0)
        size = tl.minimum(classes - tile * BLOCK_V, BLOCK_V).to(tl.float32)
        row_mass += mass
        # 0 * -inf would be NaN.
        row_moment += mass * (tl.where(mass > 0, log_mass, 0.0) + row_lse - tl.log(size))
        tl.store(active_out + block * tiles + tile, visited.to(tl.int8))
        tl.store(block_mass_out + block * tiles + tile, tl.sum(mass, 0))
    place = group.to(tl.int64) * rows + row
    tl.store(row_mass_out + place, row_mass, mask=inside)
    tl.store(row_moment_out + place, row_moment, mask=inside)


@triton.jit(do_not_specialize=["first_row", "last_row", "first_tile", "last_tile"])
def _mass_kernel(
    record,
    reference,
    lse,
    active,  # (row blocks, tiles)
    level,  # (N,)
    out,  # (some rows, some tiles)
    first_row,
    last_row,
    first_tile,
    last_tile,
    rows,
    tiles,
    mass_unit,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = first_row + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = first_tile + tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    row_inside = row < last_row
    inside = row_inside[:, None] & (tile < last_tile)[None, :]
    held = record + tile.to(tl.int64)[None, :] * rows + row[:, None]
    code = tl.load(held, mask=inside, other=-32768).to(tl.int32) + 32768
    row_reference = tl.load(reference + row, mask=row_inside, other=0.0)
    row_lse = tl.load(lse + row, mask=row_inside, other=0.0)
    log_mass = log_mass_of(code, row_reference[:, None], row_lse[:, None])
    visited = tl.load(active + (row // BLOCK_N)[:, None] * tiles + tile[None, :], mask=inside, other=1)
    mass = tl.where(visited == 0, tl.exp(log_mass), 0.0) * mass_unit
    if level is not None:
        mass *= tl.load(level + row, mask=row_inside, other=0.0)[:, None]
    place = (row - first_row).to(tl.int64)[:, None] * (last_tile - first_tile) + (tile - first_tile)[None, :]
    tl.store(out + place, mass, mask=inside)


def read_record(
    record: Tensor,  # (tiles, N) int16
    reference: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    log_threshold: float,
    classes: int,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tiles are active, (row blocks, tiles) bool, and of the others: mass a tile (tiles,), mass a row (N,), and
    `sum mass (log(mass / classes of the tile) + lse)` a row (N,).
    """
    tiles, rows = record.shape
    row_blocks, groups = ceil_divide(rows, blocks.rows), ceil_divide(tiles, _GROUP)
    options = {"dtype": torch.float32, "device": record.device}
    active = torch.empty(row_blocks, tiles, dtype=torch.int8, device=record.device)
    block_mass = torch.empty(row_blocks, tiles, **options)
    row_mass, row_moment = torch.empty(groups, rows, **options), torch.empty(groups, rows, **options)
    _read_kernel[(row_blocks, groups)](
        record, reference, lse, active, block_mass, row_mass, row_moment, log_threshold, rows, classes, tiles,
        **blocks.launch_of(BLOCK_N=blocks.rows, BLOCK_V=blocks.classes, **_LAUNCH),
    )  # fmt: skip
    return active.view(torch.bool), block_mass.sum(0), row_mass.sum(0), row_moment.sum(0)


def skipped_mass(
    out: Tensor,  # (rows, tiles of the ranges), written
    record: Tensor,  # (tiles, N) int16
    reference: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    active: Tensor,  # (row blocks, tiles) bool
    level: Tensor | None,  # (N,)
    blocks: Blocks,
    *,
    rows: tuple[int, int],
    tiles: tuple[int, int],
    unit: float,
) -> None:
    """Mass of each row in each tile that is not active, times `unit` and the row's level. rows: from a block's first"""
    grid = (ceil_divide(rows[1] - rows[0], blocks.rows), ceil_divide(tiles[1] - tiles[0], _GROUP))
    _mass_kernel[grid](
        record, reference, lse, active.view(torch.int8), level, out, *rows, *tiles, record.shape[1], record.shape[0],
        unit, **blocks.launch_of(BLOCK_N=blocks.rows, **_LAUNCH),
    )  # fmt: skip
