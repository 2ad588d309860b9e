"""Backward, first part: the residual of each active tile, from its logits formed again."""

import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import Blocks
from xhead_kernels.tile import finished, listed, tile_products


@triton.jit(do_not_specialize=["first_tile"])
def _residual_kernel(
    hidden,
    weight,
    bias,
    order,  # (V,)
    row_index,  # (N,)
    target,  # (N,)
    lse,  # (N,)
    level,  # (N,)
    target_level,  # (N,)
    row_block_of,  # (tiles of all calls,)
    class_block_of,  # (tiles of all calls,)
    out,  # (tiles, BLOCK_N, BLOCK_V)
    first_tile,
    rows,
    classes,
    size,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    local_row, local_column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    row = tl.load(row_block_of + first_tile + tile) * BLOCK_N + local_row
    column = listed(order, tl.load(class_block_of + first_tile + tile) * BLOCK_V + local_column, classes)
    row_inside = row < rows
    source = listed(row_index, row, rows)
    products = tile_products(
        hidden, weight, source, column, row_inside, classes, size, hidden_stride, weight_stride, BLOCK_N, BLOCK_V,
        BLOCK_D,
    )  # fmt: skip
    logits = finished(products, bias, column, classes, scale, softcap, HAS_BIAS, HAS_CAP)
    row_lse = tl.load(lse + row, mask=row_inside, other=0.0)
    residual = tl.exp(logits - row_lse[:, None]) * tl.load(level + row, mask=row_inside, other=0.0)[:, None]
    if HAS_TARGET:
        wanted = tl.load(target + row, mask=row_inside, other=-1)
        target_value = tl.load(target_level + row, mask=row_inside, other=0.0)
        residual += tl.where(column[None, :] == wanted[:, None], target_value[:, None], 0.0)
    if HAS_CAP:
        capped = logits / softcap
        residual *= 1 - capped * capped
    # Outside the matrices the logits are those of zeros, which count for nothing.
    residual = tl.where(row_inside[:, None] & (column < classes)[None, :], residual, 0.0)
    place = tile.to(tl.int64) * BLOCK_N * BLOCK_V + local_row[:, None] * BLOCK_V + local_column[None, :]
    tl.store(out + place, residual)


def write_residual_tiles(
    out: Tensor,  # (tiles, blocks.rows, blocks.classes), of the dtype of hidden, written
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    order: Tensor | None,  # (V,) int32, the classes as they lie in the tiles
    row_index: Tensor | None,  # (N,) int32, where the rows lie in hidden, which may have others
    target: Tensor | None,  # (N,)
    lse: Tensor,  # (N,)
    level: Tensor,  # (N,)
    target_level: Tensor | None,  # (N,)
    row_block_of: Tensor,  # (all tiles,) int32
    class_block_of: Tensor,  # (all tiles,) int32
    first_tile: int,
    blocks: Blocks,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """`level p + target_level 1[k = target]`, times the cap's slope, for the tiles listed from `first_tile` on.

    0 outside the matrices. The levels are meant to be of size 1, so that half precision holds them; `scale` is not
    multiplied in.
    """
    if not out.shape[0]:
        return
    _residual_kernel[(out.shape[0],)](
        hidden,
        weight,
        weight if bias is None else bias,
        order,
        row_index,
        lse if target is None else target,
        lse,
        level,
        lse if target_level is None else target_level,
        row_block_of,
        class_block_of,
        out,
        first_tile,
        lse.shape[0],
        weight.shape[0],
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        **blocks.launch(HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, HAS_TARGET=target_level is not None),
    )
