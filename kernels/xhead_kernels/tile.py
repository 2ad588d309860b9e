"""The classes and the logits of one tile, which every pass over the vocabulary forms in the same way."""

import triton
import triton.language as tl
from triton import knobs

# The interpreter holds bfloat16 as integers, and multiplies them as such.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def multiply_add(left, right, total):
    """`total + left @ right` with float32 sums, in right's dtype; float32 is multiplied out in full."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    else:
        left = left.to(right.dtype)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def capped(logits, softcap):
    """`softcap * tanh(logits / softcap)`"""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1): exact at both ends, where exp is 0 or infinite.
    return softcap * (1 - 2 / (tl.exp(2 * (logits / softcap)) + 1))


@triton.jit
def listed(order, place, count):
    """What a list of `count` rows or classes names at some places: the places themselves where there is no list."""
    if order is not None:
        return tl.load(order + place, mask=place < count, other=count)
    else:
        return place


@triton.jit
def tile_products(
    hidden,  # (N, D)
    weight,  # (V, D)
    row,  # (BLOCK_N,) rows of hidden
    column,  # (BLOCK_V,) rows of weight
    row_inside,  # (BLOCK_N,) which of the rows there are
    classes,
    size,
    hidden_stride,
    weight_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`hidden @ weight.T` (BLOCK_N, BLOCK_V) of any rows and classes in float32; 0 inputs outside the matrices."""
    inner = tl.arange(0, BLOCK_D)
    column_inside = column < classes
    # A row times its stride leaves 32 bits at the sizes this is for.
    hidden_rows = hidden + row.to(tl.int64)[:, None] * hidden_stride
    weight_rows = weight + column.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, size, BLOCK_D):
        inside = start + inner < size
        left = tl.load(hidden_rows + (start + inner)[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(
            weight_rows + (start + inner)[None, :], mask=column_inside[:, None] & inside[None, :], other=0.0
        )
        total = multiply_add(left, tl.trans(right), total)
    return total


@triton.jit
def described_products(
    hidden,  # descriptors of (N, D) and (V, D), whose blocks are (BLOCK_N, BLOCK_D) and (BLOCK_V, BLOCK_D)
    weight,
    first_row,
    first_class,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same for neighbouring rows and classes, which the GPU's copy engine loads, with 0 outside the matrices."""
    total = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, size, BLOCK_D):
        left, right = hidden.load([first_row, start]), weight.load([first_class, start])
        total = multiply_add(left, tl.trans(right), total)
    return total


@triton.jit
def finished(products, bias, column, classes, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """`cap(scale * (products + bias))`"""
    logits = products
    if HAS_BIAS:
        logits += tl.load(bias + column, mask=column < classes, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if HAS_CAP:
        logits = capped(logits, softcap)
    return logits
