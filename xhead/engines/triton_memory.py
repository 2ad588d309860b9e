"""What the Triton engine holds beside its inputs and the gradients that it returns, by the shapes of a call.

In bytes, at the moment when most is held, for a cross-entropy with both gradients, also where rows are ignored or
labels smoothed; a few numbers a row or a block are not counted, nor what the order of the classes remembers from call
to call (8 bytes a class), nor the (D, D) matrices of a variance.
"""

from typing import Any

import torch

from xhead.engines.weight_moments import BLOCK

LIMIT = 61_000_000
"""What the filtered backward keeps to, where rows and classes are not so many that its record alone takes as much."""

PRODUCTS_BYTES = 240 << 20  # of a slice's float32 products; the residual takes half as much in half precision
SLICE_ROWS = 1 << 15  # met at a time, so that a slice stays wide enough for a full-speed GEMM
MASS_ROWS, MASS_TILES = 256, 128  # whose masses are held at a time; rows: a multiple of a block's
_ALIGNMENT = 64  # classes; a row of a slice starts where a GEMM can load it whole words at a time
_ENOUGH, _LEAST, _MOST = 6 << 20, 1 << 24, 1 << 26  # bytes of residual tiles held at a time


def slice_shape(rows: int, classes: int, copied: int = 0) -> tuple[int, int]:
    """Rows and classes of a slice. copied: bytes of the rows that count, where others do not."""
    rows = max(min(rows, SLICE_ROWS), 1)
    held = max(PRODUCTS_BYTES - copied, PRODUCTS_BYTES // 2)
    width = max(held // (4 * rows * _ALIGNMENT), 1) * _ALIGNMENT
    return rows, min(width, -(-classes // _ALIGNMENT) * _ALIGNMENT)


def residual_bytes(rows: int, classes: int, size: int, blocks: Any, dtype: torch.dtype) -> int:
    """Of residual tiles held at a time: what the rest leaves of the limit, or more where that is too little."""
    rest = _kept(rows, classes, blocks) + _beside(rows, size, dtype) + _lists(rows, classes, blocks, 0.5)
    return min(LIMIT - rest, _MOST) if LIMIT - rest >= _ENOUGH else _LEAST


def dense_bytes(
    rows: int,
    classes: int,
    size: int,
    blocks: Any,
    dtype: torch.dtype,
    *,
    recorded: bool = True,
    ignored: bool = False,
) -> int:
    """By way of slices. blocks: the tiles' sizes; recorded: the forward left a record, which was not used.

    ignored: some rows do not count, and those that do are copied, for which the slices are narrower.
    """
    copied = rows * size * dtype.itemsize if ignored else 0
    some, width = slice_shape(rows, classes, copied)
    residual = 0 if dtype == torch.float32 else dtype.itemsize * some * width
    sums = 0 if dtype == torch.float32 else 4 * rows * size
    if dtype == torch.float16:
        sums += 4 * (rows + width) * size
    return _kept(rows, classes, blocks, recorded=recorded) + 4 * some * width + residual + sums + copied


def sparse_bytes(
    rows: int,
    classes: int,
    size: int,
    blocks: Any,
    dtype: torch.dtype,
    *,
    share: float,
    compensate: bool = True,
    ignored: bool = False,
    smoothed: bool = False,
) -> int:
    """By way of active tiles, of which there is a share. ignored: some rows do not count; smoothed: labels are."""
    tiles, item = -(-classes // blocks.classes), dtype.itemsize
    active = int(share * tiles * -(-rows // blocks.rows))
    held = min(active * blocks.rows * blocks.classes * item, residual_bytes(rows, classes, size, blocks, dtype))
    visiting = _beside(rows, size, dtype) + _lists(rows, classes, blocks, share) + held
    means, moment = tiles * size * item, size * size * item
    gathered = min(MASS_ROWS, rows) * size * item if ignored else 0
    of_rows = moment + min(MASS_ROWS, rows) * (8 * size + tiles * item)
    of_classes = moment + min(MASS_TILES, tiles) * (8 * size + rows * item)
    standing = means + gathered + max(of_rows, of_classes) if compensate else 0
    # A block of classes is freed when the next one is there.
    some_rows, some_classes = 4 * min(BLOCK, rows) * size, 4 * min(2 * BLOCK, classes) * size
    finishing = max(_beside(rows, size, dtype) + some_rows, some_classes) if smoothed else 0
    return _kept(rows, classes, blocks) + max(visiting, standing, finishing)


def _kept(rows: int, classes: int, blocks: Any, *, recorded: bool = True) -> int:
    """From forward to backward: two numbers a row; the record, what it is relative to, and the order of the classes."""
    record = 2 * -(-classes // blocks.classes) * rows + 4 * rows + 4 * classes
    return 8 * rows + (record if recorded else 0)


def _beside(rows: int, size: int, dtype: torch.dtype) -> int:
    """The last digits of the hidden states' gradient while it is added up."""
    return 0 if dtype == torch.float32 else rows * size


def _lists(rows: int, classes: int, blocks: Any, share: float) -> int:
    """Which tiles are active, as numbers a tile and as a list that is sorted twice."""
    tiles = -(-classes // blocks.classes) * -(-rows // blocks.rows)
    return int(tiles * (1 + 12 * share))
