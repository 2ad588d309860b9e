"""What the losses on vectors share: unit vectors, and work done one block of rows after another."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xhead.replay import BLOCK_BYTES


def unit(vectors: Tensor) -> Tensor:
    """`v / max(|v|, 1e-12)` along the last dimension, in float32 (float64 for float64).

    vectors: (..., D) -> (..., D)
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=1e-12)


def in_row_blocks(
    function: Callable[..., Tensor],
    rows: tuple[Tensor, ...],  # each (n, ...)
    width: int,
) -> Tensor:
    """`function(*rows)`, computed for as many rows at a time as leave the memory bounded.

    width: how many numbers a row the function holds. They live while the block is worked on, forward and, under
    activation checkpointing, again backward. A function of (b, ...) rows gives (b, ...).
    """
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    starts = range(0, max(rows[0].shape[0], 1), step)
    blocks = [checkpoint(function, *(r[s : s + step] for r in rows), use_reentrant=False) for s in starts]
    return torch.cat(blocks)


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless the value is a positive, finite number."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
