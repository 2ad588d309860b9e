"""The logits of one tile, which every pass over the vocabulary forms in the same way."""

import triton
import triton.language as tl
from triton import knobs

# The interpreter holds bfloat16 as integers, and multiplies them as such.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def multiply_add(left, right, total):
    """`total + left @ right` with float32 sums; float32 is multiplied out in full."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def capped(logits, softcap):
    """`softcap * tanh(logits / softcap)`"""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1): exact at both ends, where exp is 0 or infinite.
    return softcap * (1 - 2 / (tl.exp(2 * (logits / softcap)) + 1))


@triton.jit
def tile_logits(
    hidden,  # (N, D)
    weight,  # (V, D)
    bias,  # (V,)
    row,  # (BLOCK_N,) rows of hidden
    column,  # (BLOCK_V,) rows of weight
    rows,
    classes,
    size,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`cap(scale * (hidden @ weight.T + bias))` (BLOCK_N, BLOCK_V) in float32; 0 inputs outside the matrices."""
    inner = tl.arange(0, BLOCK_D)
    row_inside, column_inside = row < rows, column < classes
    # A row times its stride leaves 32 bits at the sizes this is for.
    hidden_rows = hidden + row.to(tl.int64)[:, None] * hidden_stride
    weight_rows = weight + column.to(tl.int64)[:, None] * weight_stride
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, size, BLOCK_D):
        inside = start + inner < size
        left = tl.load(hidden_rows + (start + inner)[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(
            weight_rows + (start + inner)[None, :], mask=column_inside[:, None] & inside[None, :], other=0.0
        )
        logits = multiply_add(left, tl.trans(right), logits)
    if HAS_BIAS:
        logits += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if HAS_CAP:
        logits = capped(logits, softcap)
    return logits
