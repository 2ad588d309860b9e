"""Backward, second part: the residual tiles multiplied out, each gradient block by one program alone.

No atomics: sums are in float32 registers, in the order of the tiles, the same from run to run.
"""

import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import Blocks, ceil_divide
from xhead_kernels.tile import classes_at, multiply_add


@triton.jit
def _hidden_grad_kernel(
    residual,  # (tiles, BLOCK_N, BLOCK_V)
    weight,
    order,  # (V,)
    row_start,  # (row blocks + 1,)
    row_tile,  # (tiles,) the tiles sorted by row block
    class_block_of,  # (tiles,)
    hidden_grad,  # (N, D) float32
    rows,
    classes,
    size,
    weight_stride,
    grad_stride,
    factor,  # (1,)
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INNER: tl.constexpr,
):
    block = tl.program_id(0)
    local_row, inner = tl.arange(0, BLOCK_N), tl.arange(0, INNER)
    row, feature = block * BLOCK_N + local_row, tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for entry in range(tl.load(row_start + block), tl.load(row_start + block + 1)):
        tile = tl.load(row_tile + entry)
        first_class = tl.load(class_block_of + tile) * BLOCK_V
        tile_rows = residual + tile.to(tl.int64) * BLOCK_N * BLOCK_V + local_row[:, None] * BLOCK_V
        for start in range(0, BLOCK_V, INNER):
            column = classes_at(order, first_class + start + inner, classes)
            left = tl.load(tile_rows + (start + inner)[None, :])
            right = tl.load(
                weight + column.to(tl.int64)[:, None] * weight_stride + feature[None, :],
                mask=(column < classes)[:, None] & (feature < size)[None, :],
                other=0.0,
            )
            total = multiply_add(left, right, total)
    place = hidden_grad + row.to(tl.int64)[:, None] * grad_stride + feature[None, :]
    inside = (row < rows)[:, None] & (feature < size)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total * tl.load(factor), mask=inside)


@triton.jit
def _weight_grad_kernel(
    residual,
    hidden,
    order,
    class_start,  # (class blocks + 1,) int64, so that a tile's place does not overflow
    row_block_of,  # (tiles,)
    rest,  # (class blocks, D) float32, added to each class of the block
    rest_bias,  # (class blocks,)
    weight_grad,  # (V, D)
    bias_grad,  # (V,) float32
    first_block,
    rows,
    classes,
    size,
    hidden_stride,
    grad_stride,
    factor,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INNER: tl.constexpr,
):
    block = tl.program_id(0)
    local_column, inner = tl.arange(0, BLOCK_V), tl.arange(0, INNER)
    column = classes_at(order, (first_block + block) * BLOCK_V + local_column, classes)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = weight_grad + column.to(tl.int64)[:, None] * grad_stride + feature[None, :]
    inside = (column < classes)[:, None] & (feature < size)[None, :]
    scale = tl.load(factor)
    # What is there already starts the sum, rather than joining it at the end beside a full set of registers.
    rest_row = (
        tl.load(rest + (first_block + block).to(tl.int64) * size + feature, mask=feature < size, other=0.0) / scale
    )
    total = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32) + rest_row[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32) / scale
    column_total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for tile in range(tl.load(class_start + block), tl.load(class_start + block + 1)):
        first_row = tl.load(row_block_of + tile) * BLOCK_N
        tile_start = residual + tile * (BLOCK_N * BLOCK_V)
        for start in range(0, BLOCK_N, INNER):
            row = first_row + start + inner
            left = tl.load(tile_start + (start + inner)[:, None] * BLOCK_V + local_column[None, :])
            right = tl.load(
                hidden + row.to(tl.int64)[:, None] * hidden_stride + feature[None, :],
                mask=(row < rows)[:, None] & (feature < size)[None, :],
                other=0.0,
            )
            total = multiply_add(tl.trans(left), right, total)
            if HAS_BIAS:
                column_total += tl.sum(left.to(tl.float32), 0)
    tl.store(place, total * scale, mask=inside)
    if HAS_BIAS and tl.program_id(1) == 0:
        column_total = column_total * scale + tl.load(rest_bias + first_block + block)
        tl.store(bias_grad + column, column_total, mask=column < classes)


def add_hidden_grad(
    hidden_grad: Tensor,  # (N, D) float32
    residual: Tensor,  # (tiles, rows of a block, classes of a block)
    weight: Tensor,  # (V, D)
    order: Tensor | None,  # (V,) int32
    row_start: Tensor,  # (row blocks + 1,) int64
    row_tile: Tensor,  # (tiles,) int32
    class_block_of: Tensor,  # (tiles,) int32
    factor: Tensor,  # (1,) float32
    blocks: Blocks,
) -> None:
    """`hidden_grad += factor * residual @ weight` over the tiles of each block of rows."""
    rows, size = hidden_grad.shape
    width = 2 * blocks.inner
    _hidden_grad_kernel[(ceil_divide(rows, blocks.rows), ceil_divide(size, width))](
        residual,
        weight,
        order,
        row_start,
        row_tile,
        class_block_of,
        hidden_grad,
        rows,
        weight.shape[0],
        size,
        weight.stride(0),
        hidden_grad.stride(0),
        factor,
        **blocks.launch(BLOCK_D=width, INNER=min(blocks.inner, blocks.classes)),
    )


def write_weight_grad(
    weight_grad: Tensor,  # (V, D)
    bias_grad: Tensor | None,  # (V,) float32
    residual: Tensor,  # (tiles, rows of a block, classes of a block), sorted by class block
    hidden: Tensor,  # (N, D)
    order: Tensor | None,  # (V,) int32
    class_start: Tensor,  # (class blocks of this call + 1,) int64
    row_block_of: Tensor,  # (tiles,) int32
    rest: Tensor,  # (class blocks, D) float32
    rest_bias: Tensor,  # (class blocks,) float32
    factor: Tensor,  # (1,) float32
    first_block: int,
    blocks: Blocks,
    *,
    add: bool,
) -> None:
    """`factor * residual' @ hidden + rest` for the class blocks from `first_block` on; `add`: to what is there."""
    rows, size = hidden.shape
    width = 2 * blocks.inner
    _weight_grad_kernel[(class_start.shape[0] - 1, ceil_divide(size, width))](
        residual,
        hidden,
        order,
        class_start,
        row_block_of,
        rest,
        rest_bias,
        weight_grad,
        rest_bias if bias_grad is None else bias_grad,
        first_block,
        rows,
        weight_grad.shape[0],
        size,
        hidden.stride(0),
        weight_grad.stride(0),
        factor,
        **blocks.launch(HAS_BIAS=bias_grad is not None, ADD=add, BLOCK_D=width, INNER=min(blocks.inner, blocks.rows)),
    )
