"""What stands in for the tiles that are not visited: means, second moments and gradients of blocks of classes."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import Blocks, ceil_divide
from xhead_kernels.sums import store_first, upper_of
from xhead_kernels.tile import listed, multiply_add, tile_products

_MEAN: dict[str, Any] = {"FEATURES": 128, "INNER": 32, "num_warps": 4}
_TILT: dict[str, Any] = {"ROWS": 16, "FEATURES": 256, "num_warps": 4}


@triton.jit
def _mean_kernel(
    weight,  # (V, D)
    order,  # (V,)
    out,  # (tiles, D)
    classes,
    size,
    weight_stride,
    BLOCK_V: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    tile = tl.program_id(0)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((FEATURES,), dtype=tl.float32)
    for start in range(0, BLOCK_V, INNER):
        column = listed(order, tile * BLOCK_V + start + tl.arange(0, INNER), classes)
        inside = (column < classes)[:, None] & (feature < size)[None, :]
        rows = tl.load(weight + column.to(tl.int64)[:, None] * weight_stride + feature[None, :], mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32), 0)
    count = tl.minimum(classes - tile * BLOCK_V, BLOCK_V).to(tl.float32)
    tl.store(out + tile.to(tl.int64) * size + feature, total / count, mask=feature < size)


@triton.jit
def _moment_kernel(
    matrix,  # (n, D)
    order,  # (n,)
    mean,  # (n / WIDTH, D)
    share,  # (n,)
    deviation,  # (n,)
    unit,  # (1,)
    out,  # (D, D)
    vector_out,  # (D,)
    count,
    size,
    stride,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INNER: tl.constexpr,
):
    # Symmetric: one of the two halves is worked out, and written twice.
    if tl.program_id(1) <= tl.program_id(0):
        inner = tl.arange(0, INNER)
        high = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        low = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
        vector = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(0, count, INNER):
            place = start + inner
            source = matrix + listed(order, place, count).to(tl.int64)[:, None] * stride
            inside = (place < count)[:, None]
            left = tl.load(source + high[None, :], mask=inside & (high < size)[None, :], other=0.0)
            right = tl.load(source + low[None, :], mask=inside & (low < size)[None, :], other=0.0)
            # A share of 0 outside takes out what a mean puts there.
            row_share = tl.load(share + place, mask=place < count, other=0.0)
            wide = left.to(tl.float32)
            if mean is not None:
                row_mean = mean + tl.cast(start // WIDTH, tl.int64) * size
                wide -= tl.load(row_mean + high, mask=high < size, other=0.0).to(tl.float32)[None, :]
                centre = tl.load(row_mean + low, mask=low < size, other=0.0).to(tl.float32)
                right = (right.to(tl.float32) - centre[None, :]).to(left.dtype)
            wide *= row_share[:, None]
            total = multiply_add(tl.trans(wide.to(left.dtype)), right, total)
            if deviation is not None:
                vector += tl.sum(wide * tl.load(deviation + place, mask=place < count, other=0.0)[:, None], 0)
        total *= tl.load(unit)
        inside = (high < size)[:, None] & (low < size)[None, :]
        tl.store(out + high.to(tl.int64)[:, None] * size + low[None, :], total, mask=inside)
        tl.store(out + low.to(tl.int64)[None, :] * size + high[:, None], total, mask=inside)
        if deviation is not None:  # noqa: SIM102 (what is not there must not be compiled)
            if tl.program_id(1) == tl.program_id(0):
                tl.store(vector_out + high, vector * tl.load(unit), mask=high < size)


@triton.jit(do_not_specialize=["first_row", "last_row"])
def _hidden_kernel(
    of_means,  # (n, D) of some rows, as all that follow up to `product`
    product,
    hidden,  # (all rows, D)
    row_index,  # (N,)
    with_bias,  # (D,)
    centre_bias,  # (n,) of some rows
    mass,  # (N,), as all that follow up to `level`
    moment,
    level,
    factor,  # (1,)
    upper,  # (all rows, D)
    first_row,
    last_row,
    size,
    hidden_stride,
    scale,
    limit,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = first_row + local
    row_inside = row < last_row
    source = listed(row_index, row, last_row).to(tl.int64)
    local_place = local.to(tl.int64)[:, None] * size
    coefficient = tl.zeros((ROWS,), dtype=tl.float32)
    if product is not None:
        centre = tl.zeros((ROWS,), dtype=tl.float32)
        spread = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, size, FEATURES):
            feature = start + tl.arange(0, FEATURES)
            inside = row_inside[:, None] & (feature < size)[None, :]
            states = tl.load(hidden + source[:, None] * hidden_stride + feature[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            centre += tl.sum(tl.load(of_means + local_place + feature[None, :], mask=inside, other=0.0) * states, 1)
            moved = tl.load(product + local_place + feature[None, :], mask=inside, other=0.0)
            if with_bias is not None:
                moved += tl.load(with_bias + feature, mask=feature < size, other=0.0)[None, :]
            spread += tl.sum(moved * states, 1)
        if centre_bias is not None:
            centre += tl.load(centre_bias + local, mask=row_inside, other=0.0)
        row_mass = tl.load(mass + row, mask=row_inside, other=0.0)
        wanted = 2 * tl.maximum(tl.load(moment + row, mask=row_inside, other=0.0) - centre * scale, 0.0)
        spread *= scale * scale * row_mass
        # Where the skipped logits hardly vary there is no tilt to speak of, and the quotient is noise.
        tilt = tl.where(spread > 0, tl.minimum(wanted / tl.where(spread > 0, spread, 1.0), limit), 0.0)
        coefficient = tilt * row_mass * scale
    row_level = tl.load(level + row, mask=row_inside, other=0.0) * tl.load(factor)
    for start in range(0, size, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        inside = row_inside[:, None] & (feature < size)[None, :]
        value = tl.load(of_means + local_place + feature[None, :], mask=inside, other=0.0)
        if product is not None:
            moved = tl.load(product + local_place + feature[None, :], mask=inside, other=0.0)
            if with_bias is not None:
                moved += tl.load(with_bias + feature, mask=feature < size, other=0.0)[None, :]
            value += coefficient[:, None] * moved
        store_first(upper, source[:, None] * size + feature[None, :], value * row_level[:, None], inside)


@triton.jit(do_not_specialize=["first_tile"])
def _class_kernel(
    weight,  # (V, D)
    order,  # (V,)
    direction,  # (D, D), symmetric
    coefficient,  # (tiles,)
    rest,  # (some tiles, D)
    weight_grad,  # (V, D)
    first_tile,
    classes,
    size,
    weight_stride,
    grad_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    local = tl.program_id(0)
    tile = first_tile + local
    column = listed(order, tile * BLOCK_N + tl.arange(0, BLOCK_N), classes)
    feature = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    value = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if direction is not None:
        value = tile_products(
            weight, direction, column, feature, column < classes, size, size, weight_stride, size, BLOCK_N, BLOCK_V,
            BLOCK_D,
        )  # fmt: skip
        value *= tl.load(coefficient + tile)
    value += tl.load(rest + local.to(tl.int64) * size + feature, mask=feature < size, other=0.0)[None, :]
    place = weight_grad + column.to(tl.int64)[:, None] * grad_stride + feature[None, :]
    tl.store(place, value, mask=(column < classes)[:, None] & (feature < size)[None, :])


def block_means(weight: Tensor, order: Tensor, blocks: Blocks) -> Tensor:
    """Mean row of the weight in each tile, in the weight's dtype: (tiles, D). weight: (V, D), order: (V,)"""
    classes, size = weight.shape
    out = weight.new_empty(ceil_divide(classes, blocks.classes), size)
    _mean_kernel[(out.shape[0], ceil_divide(size, _MEAN["FEATURES"]))](
        weight, order, out, classes, size, weight.stride(0), **blocks.launch_of(BLOCK_V=blocks.classes, **_MEAN),
    )  # fmt: skip
    return out


def second_moment(
    out: Tensor,  # (D, D), written
    matrix: Tensor,  # (n, D), or more rows
    share: Tensor,  # (n,) float32, of size 1 at most
    unit: Tensor,  # (1,) float32
    blocks: Blocks,
    *,
    order: Tensor | None = None,  # (n,), where the matrix may have other rows, too
    mean: Tensor | None = None,  # (n / width, D)
    width: int = 1,
    deviation: Tensor | None = None,  # (n,)
) -> Tensor | None:
    """`unit sum_k share_k (x_k - mean)(x_k - mean)'`, x_k the row `order_k` of the matrix, and the mean its block's.

    With deviations, also `unit sum_k share_k deviation_k (x_k - mean)`: (D,).
    """
    count, size = share.shape[0], matrix.shape[1]
    vector = None if deviation is None else torch.empty(size, dtype=torch.float32, device=matrix.device)
    across = ceil_divide(size, 2 * blocks.inner)
    _moment_kernel[(across, across)](
        matrix, order, mean, share, deviation, unit, out, vector, count, size, matrix.stride(0),
        **blocks.launch_of(WIDTH=width, BLOCK_D=2 * blocks.inner, INNER=blocks.inner),
    )  # fmt: skip
    return vector


def write_hidden_grad(
    hidden_grad: Tensor,  # (all rows, D), the sums, as `sums` keeps them
    half: bool,
    of_means: Tensor,  # (n, D) float32, `sum_b m_ib wbar_b` of some rows
    product: Tensor | None,  # (n, D) float32, `G h_i`; None without a tilt
    hidden: Tensor,  # (all rows, D)
    row_index: Tensor | None,  # (N,) int32, the rows that count; None for all
    with_bias: Tensor | None,  # (D,) float32
    centre_bias: Tensor | None,  # (n,) float32, `sum_b m_ib bias_b`
    mass: Tensor,  # (N,) float32
    moment: Tensor,  # (N,) float32, `sum_b m_ib (log m_ib / |b| + lse)`
    level: Tensor,  # (N,) float32
    factor: Tensor,  # (1,) float32
    rows: tuple[int, int],
    *,
    scale: float,
    limit: float,
) -> None:
    """`factor level_i (sum_b m_ib wbar_b + tilt_i m_i scale (G h_i + with_bias))`, tilt_i at most `limit`."""
    size = hidden.shape[1]
    _hidden_kernel[(ceil_divide(rows[1] - rows[0], _TILT["ROWS"]),)](
        of_means, product, hidden, row_index, with_bias, centre_bias, mass, moment, level, factor,
        upper_of(hidden_grad, half=half), *rows, size, hidden.stride(0), scale, limit, **_TILT,
    )  # fmt: skip


def write_weight_grad(
    weight_grad: Tensor,  # (V, D), the classes of the tiles written
    weight: Tensor,  # (V, D)
    order: Tensor,  # (V,) int32
    direction: Tensor | None,  # (D, D), symmetric
    coefficient: Tensor,  # (all tiles,) float32
    rest: Tensor,  # (tiles from `first_tile` on, D) float32
    first_tile: int,
    blocks: Blocks,
) -> None:
    """`coefficient_b direction w_k + rest_b` for the classes k of some tiles b."""
    classes, size = weight.shape
    width = 2 * blocks.inner
    _class_kernel[(rest.shape[0], ceil_divide(size, width))](
        weight, order, direction, coefficient, rest, weight_grad, first_tile, classes, size, weight.stride(0),
        weight_grad.stride(0),
        **blocks.launch_of(BLOCK_N=blocks.classes, BLOCK_V=width, BLOCK_D=blocks.inner),
    )  # fmt: skip
