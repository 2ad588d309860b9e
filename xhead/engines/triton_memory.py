"""What the Triton engine holds beside its inputs and the gradients that it returns, by the shapes of a call.

Bytes at the moment when most is held, for a cross-entropy of all rows with both gradients. Some numbers a row or a
block are left out: under a hundredth. Rows that are ignored add a copy of those that are not, and of their gradient;
statistics with a closed form of their own beside `lse` and `target` keep the hidden states' gradient in float32.
"""

from typing import Any

import torch

LIMIT = 64_000_000
"""What the filtered backward keeps to, where rows and classes are not so many that the record alone takes as much."""

PRODUCTS_BYTES = 240 << 20  # of a slice's float32 products; the residual takes half as much in half precision
_LEAST, _MOST = 1 << 23, 1 << 26  # bytes of residual tiles held at a time


def _half(dtype: torch.dtype) -> bool:
    return dtype != torch.float32


def _kept(rows: int, classes: int, blocks: Any) -> int:
    """From forward to backward: the record, its reference, two numbers a row, and the order of the classes."""
    tiles = -(-classes // blocks.classes)
    return 2 * tiles * rows + 12 * rows + 4 * classes


def _sums(rows: int, size: int, dtype: torch.dtype) -> int:
    """Beside the hidden states' gradient, to add it up."""
    return rows * size if _half(dtype) else 0


def _lists(rows: int, classes: int, blocks: Any, share: float) -> int:
    """The list of the active tiles, twice sorted, which tiles are active, and some numbers a row."""
    tiles = -(-classes // blocks.classes) * -(-rows // blocks.rows)
    return int(tiles * (1 + 12 * share)) + 24 * rows


def residual_bytes(rows: int, size: int, classes: int, blocks: Any, dtype: torch.dtype) -> int:
    """Of residual tiles held at a time: what the rest leaves of the limit."""
    rest = _kept(rows, classes, blocks) + _sums(rows, size, dtype) + _lists(rows, classes, blocks, 0.5)
    return min(max(LIMIT - rest, _LEAST), _MOST)
