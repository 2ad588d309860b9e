"""Backward over a slice of the classes: the gradient of any of the statistics for the products, entry by entry."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import ceil_divide
from xhead_kernels.slices import Slice, in_columns, slice_logits
from xhead_kernels.summands import summand_slope

BLOCK = 1024  # classes of a program
WARPS = 8


class RowFactors(NamedTuple):
    """Of each row, what its entries are multiplied with; None where a statistic has no gradient. (n,) float32 each.

    With p = exp(o - lse) and q = exp(o - complement_lse) outside the row's columns, an entry is

        p (level + slope o + values . direction) + complement q + pointwise s'(o)
            + target 1[k = target] (or target_k) + mean mean_weight_k + variance (o - centre)

    with 1 for mean_weight_k where there is none.
    """

    lse: Tensor | None = None
    level: Tensor | None = None
    slope: Tensor | None = None
    direction: Tensor | None = None  # (n, M)
    complement_lse: Tensor | None = None  # inf where no class is left
    complement: Tensor | None = None
    pointwise: Tensor | None = None
    target: Tensor | None = None
    mean: Tensor | None = None
    centre: Tensor | None = None
    variance: Tensor | None = None


@triton.jit
def _slice_residual_kernel(
    products,
    bias,
    target,
    values,
    mean_weight,
    row_offsets,
    columns,
    lse_of,
    level_of,
    slope_of,
    direction_of,
    complement_lse_of,
    complement_of,
    pointwise_of,
    target_of,
    mean_of,
    centre_of,
    variance_of,
    out,  # (n, c)
    first_class,
    rows,
    classes,
    products_stride,
    target_stride,
    values_count,
    values_stride,
    out_stride,
    scale,
    softcap,
    first,
    second,
    third,
    POINTWISE: tl.constexpr,
    SOFT_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, column = local < classes, first_class + local
    logits = slice_logits(products, bias, row, local, first_class, classes, products_stride, scale, softcap)
    # 0 * inf would be NaN.
    finite = tl.where(inside, logits, 0.0)
    residual = tl.zeros((BLOCK,), dtype=tl.float32)
    if lse_of is not None:
        factor = tl.zeros((BLOCK,), dtype=tl.float32)
        if level_of is not None:
            factor += tl.load(level_of + row)
        if slope_of is not None:
            # p is 0 where the logit is -inf, and 0 * -inf would be NaN.
            factor += tl.load(slope_of + row) * tl.where(logits == float("-inf"), 0.0, logits)
        if direction_of is not None:
            for index in range(values_count):
                direction = tl.load(direction_of + row.to(tl.int64) * values_count + index)
                of_classes = values + tl.cast(index, tl.int64) * values_stride + column
                factor += direction * tl.load(of_classes, mask=inside, other=0.0)
        residual += tl.exp(logits - tl.load(lse_of + row)) * factor
    if complement_of is not None:
        share = tl.exp(logits - tl.load(complement_lse_of + row)) * tl.load(complement_of + row)
        residual += tl.where(in_columns(column, row_offsets, columns, row, BLOCK), 0.0, share)
    if pointwise_of is not None:
        residual += tl.load(pointwise_of + row) * summand_slope(finite, first, second, third, POINTWISE)
    if target_of is not None:
        upstream = tl.load(target_of + row)
        if SOFT_TARGET:
            place = target + row.to(tl.int64) * target_stride + local
            residual += upstream * tl.load(place, mask=inside, other=0.0).to(tl.float32)
        else:
            residual += tl.where(column == tl.load(target + row), upstream, 0.0)
    if mean_of is not None:
        upstream = tl.load(mean_of + row)
        if mean_weight is not None:
            residual += upstream * tl.load(mean_weight + column, mask=inside, other=0.0)
        else:
            residual += upstream
    if variance_of is not None:
        residual += tl.load(variance_of + row) * (finite - tl.load(centre_of + row))
    if softcap is not None:
        ratio = finite / softcap
        residual *= 1 - ratio * ratio
    tl.store(out + row.to(tl.int64) * out_stride + local, residual * scale, mask=inside)


def slice_residual(part: Slice, factors: RowFactors, out: Tensor) -> None:
    """Write the gradient for `hidden @ weight.T` into out (n, c), which may be `part.products` itself."""
    rows, classes = part.products.shape
    if not out.numel():
        return
    options: dict[str, Any] = {
        **part.arguments(),
        **{f"{name}_of": tensor for name, tensor in factors._asdict().items()},
        "out": out,
        "out_stride": out.stride(0),
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }
    _slice_residual_kernel[(ceil_divide(classes, BLOCK), rows)](**options)
