"""Backward, second part: the residual tiles multiplied out, each gradient block by one program alone.

No atomics: sums are in float32 registers, in the order of the tiles, the same from run to run.
"""

import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import Blocks, ceil_divide
from xhead_kernels.sums import load_sum, store_sum, upper_of
from xhead_kernels.tile import listed, multiply_add


# What changes from call to call must not make another kernel of it.
@triton.jit(do_not_specialize=["first_group", "first_tile"])
def _hidden_grad_kernel(
    residual,  # (tiles, BLOCK_N, BLOCK_V)
    weight,
    order,  # (V,)
    row_index,  # (rows,) into the sums
    row_start,  # (calls * row blocks + 1,) int64, into `row_tile`
    row_tile,  # (tiles of all calls,) the tiles sorted by call and row block
    class_block_of,  # (tiles of all calls,)
    upper,  # (N, D), the sums
    lower,  # (N, D)
    first_group,  # of this call, in `row_start`
    first_tile,  # of this call, which is the first in `residual`
    rows,
    classes,
    size,
    weight_stride,
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
    group = row_start + first_group + block
    first, last = tl.load(group), tl.load(group + 1)
    for entry in range(first, last):
        tile = tl.load(row_tile + entry)
        first_class = tl.load(class_block_of + tile) * BLOCK_V
        tile_rows = residual + (tile - first_tile).to(tl.int64) * BLOCK_N * BLOCK_V + local_row[:, None] * BLOCK_V
        for start in range(0, BLOCK_V, INNER):
            column = listed(order, first_class + start + inner, classes)
            left = tl.load(tile_rows + (start + inner)[None, :])
            right = tl.load(
                weight + column.to(tl.int64)[:, None] * weight_stride + feature[None, :],
                mask=(column < classes)[:, None] & (feature < size)[None, :],
                other=0.0,
            )
            total = multiply_add(left, right, total)
    if first < last:
        place = listed(row_index, row, rows).to(tl.int64)[:, None] * size + feature[None, :]
        inside = (row < rows)[:, None] & (feature < size)[None, :]
        total = load_sum(upper, lower, place, inside) + total * tl.load(factor)
        store_sum(upper, lower, place, total, inside)


@triton.jit(do_not_specialize=["first_tile", "first_block"])
def _weight_grad_kernel(
    residual,
    hidden,
    order,
    row_index,  # (rows,) into hidden
    class_start,  # (class blocks + 1,) int64, into `row_block_of`
    row_block_of,  # (tiles of all calls,)
    weight_grad,  # (V, D)
    first_tile,
    first_block,
    rows,
    classes,
    size,
    hidden_stride,
    grad_stride,
    factor,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INNER: tl.constexpr,
):
    block = first_block + tl.program_id(0)
    first, last = tl.load(class_start + block), tl.load(class_start + block + 1)
    if first < last:
        local_column, inner = tl.arange(0, BLOCK_V), tl.arange(0, INNER)
        column = listed(order, block * BLOCK_V + local_column, classes)
        feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        place = weight_grad + column.to(tl.int64)[:, None] * grad_stride + feature[None, :]
        inside = (column < classes)[:, None] & (feature < size)[None, :]
        scale = tl.load(factor)
        # What is there already starts the sum, rather than joining it at the end beside a full set of registers.
        total = tl.load(place, mask=inside, other=0.0).to(tl.float32) / scale
        for tile in range(first, last):
            first_row = tl.load(row_block_of + tile) * BLOCK_N
            tile_start = residual + (tile - first_tile) * (BLOCK_N * BLOCK_V)
            for start in range(0, BLOCK_N, INNER):
                row = first_row + start + inner
                source = listed(row_index, row, rows).to(tl.int64)
                right = tl.load(
                    hidden + source[:, None] * hidden_stride + feature[None, :],
                    mask=(row < rows)[:, None] & (feature < size)[None, :],
                    other=0.0,
                )
                left = tl.load(tile_start + (start + inner)[:, None] * BLOCK_V + local_column[None, :])
                total = multiply_add(tl.trans(left), right, total)
        tl.store(place, total * scale, mask=inside)


def add_hidden_grad(
    hidden_grad: Tensor,  # (N, D), the sums, as `sums` keeps them
    lower: Tensor | None,  # (N, D)
    residual: Tensor,  # (tiles, rows of a block, classes of a block), those from `first_tile` on
    weight: Tensor,  # (V, D)
    order: Tensor | None,  # (V,) int32
    row_index: Tensor | None,  # (rows that count,) int32, where others are beside them
    row_start: Tensor,  # (calls * row blocks + 1,) int64
    row_tile: Tensor,  # (tiles of all calls,) int32
    class_block_of: Tensor,  # (tiles of all calls,) int32
    factor: Tensor,  # (1,) float32
    call: int,
    first_tile: int,
    blocks: Blocks,
) -> None:
    """`hidden_grad += factor * residual @ weight` over the tiles of each block of rows."""
    rows, size = hidden_grad.shape
    rows = rows if row_index is None else row_index.shape[0]
    width, row_blocks = 2 * blocks.inner, ceil_divide(rows, blocks.rows)
    _hidden_grad_kernel[(row_blocks, ceil_divide(size, width))](
        residual,
        weight,
        order,
        row_index,
        row_start,
        row_tile,
        class_block_of,
        upper_of(hidden_grad, half=lower is not None),
        lower,
        call * row_blocks,
        first_tile,
        rows,
        weight.shape[0],
        size,
        weight.stride(0),
        factor,
        **blocks.launch(BLOCK_D=width, INNER=min(blocks.inner, blocks.classes)),
    )


def add_weight_grad(
    weight_grad: Tensor,  # (V, D)
    residual: Tensor,  # (tiles, rows of a block, classes of a block), those from `first_tile` on
    hidden: Tensor,  # (N, D)
    order: Tensor | None,  # (V,) int32
    row_index: Tensor | None,  # (rows that count,) int32, where others are beside them
    class_start: Tensor,  # (class blocks + 1,) int64
    row_block_of: Tensor,  # (tiles of all calls,) int32, sorted by class block
    factor: Tensor,  # (1,) float32
    first_tile: int,
    class_blocks: tuple[int, int],
    blocks: Blocks,
) -> None:
    """`weight_grad += factor * residual' @ hidden` for some class blocks."""
    rows, size = hidden.shape
    rows = rows if row_index is None else row_index.shape[0]
    width = 2 * blocks.inner
    _weight_grad_kernel[(class_blocks[1] - class_blocks[0], ceil_divide(size, width))](
        residual,
        hidden,
        order,
        row_index,
        class_start,
        row_block_of,
        weight_grad,
        first_tile,
        class_blocks[0],
        rows,
        weight_grad.shape[0],
        size,
        hidden.stride(0),
        weight_grad.stride(0),
        factor,
        **blocks.launch(BLOCK_D=width, INNER=min(blocks.inner, blocks.rows)),
    )
