"""Forward over a slice of the classes: what each row's logits in it add to any of the statistics."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import ceil_divide
from xhead_kernels.slices import Slice, in_columns, slice_logits
from xhead_kernels.summands import summand_value

BLOCK = 2048  # classes a program sums up
WARPS = 8


@triton.jit
def _slice_statistics_kernel(
    products,
    bias,
    target,
    values,
    mean_weight,
    row_offsets,
    columns,
    shift_out,  # (blocks, n), as all that follow
    total_out,
    argmax_out,
    entropy_out,
    expectation_out,  # (blocks, n, M)
    complement_shift_out,
    complement_total_out,
    pointwise_sum_out,
    target_out,
    mean_out,
    centre_out,
    variance_out,
    first_class,
    rows,
    classes,
    products_stride,
    target_stride,
    values_count,
    values_stride,
    scale,
    softcap,
    first,
    second,
    third,
    POINTWISE: tl.constexpr,
    SOFT_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1)
    local = block * BLOCK + tl.arange(0, BLOCK)
    inside, column = local < classes, first_class + local
    place = block.to(tl.int64) * rows + row
    logits = slice_logits(products, bias, row, local, first_class, classes, products_stride, scale, softcap)
    shift = tl.max(logits, 0)
    # A block of -inf only must not become NaN through -inf - (-inf).
    base = tl.where(shift == float("-inf"), 0.0, shift)
    exponentials = tl.exp(logits - base)
    tl.store(shift_out + place, shift)
    tl.store(total_out + place, tl.sum(exponentials, 0))
    # 0 * inf would be NaN.
    finite = tl.where(inside, logits, 0.0)
    if argmax_out is not None:
        tl.store(argmax_out + place, tl.argmax(logits, 0).to(tl.int64) + first_class + block * BLOCK)
    if entropy_out is not None:
        relative = tl.where(logits == float("-inf"), 0.0, logits - base)
        tl.store(entropy_out + place, tl.sum(exponentials * relative, 0))
    if expectation_out is not None:
        for index in range(values_count):
            of_classes = values + tl.cast(index, tl.int64) * values_stride + column
            moment = tl.sum(tl.load(of_classes, mask=inside, other=0.0) * exponentials, 0)
            tl.store(expectation_out + place * values_count + index, moment)
    if complement_shift_out is not None:
        others = tl.where(in_columns(column, row_offsets, columns, row, BLOCK), float("-inf"), logits)
        others_shift = tl.max(others, 0)
        others_base = tl.where(others_shift == float("-inf"), 0.0, others_shift)
        tl.store(complement_shift_out + place, others_shift)
        tl.store(complement_total_out + place, tl.sum(tl.exp(others - others_base), 0))
    if pointwise_sum_out is not None:
        summands = summand_value(finite, first, second, third, POINTWISE)
        tl.store(pointwise_sum_out + place, tl.sum(tl.where(inside, summands, 0.0), 0))
    if target_out is not None:
        share = tl.load(target + row.to(tl.int64) * target_stride + local, mask=inside, other=0.0).to(tl.float32)
        tl.store(target_out + place, tl.sum(share * finite, 0))
    if mean_out is not None:
        weighted = finite
        if mean_weight is not None:
            weighted *= tl.load(mean_weight + column, mask=inside, other=0.0)
        tl.store(mean_out + place, tl.sum(weighted, 0))
    if variance_out is not None:
        count = tl.sum(inside.to(tl.float32), 0)
        centre = tl.sum(finite, 0) / count
        deviation = tl.where(inside, logits - centre, 0.0)
        tl.store(centre_out + place, centre)
        tl.store(variance_out + place, tl.sum(deviation * deviation, 0))


def slice_statistics(part: Slice, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Sums over each block of `BLOCK` classes, (blocks, n) each, for the statistics named.

    | key | of the block's logits |
    |---|---|
    | `shift`, `total` | their largest, `sum exp(o - shift)` |
    | `argmax` | the class of the largest |
    | `entropy`, `expectation` | `sum exp(o - shift) (o - shift)`, `sum exp(o - shift) values`: (blocks, n, M) |
    | `complement_shift`, `complement_total` | as `shift` and `total`, without the row's columns |
    | `pointwise_sum` | `sum s(o)` |
    | `target`, `mean` | `sum target o`, `sum mean_weight o` (1 where there is no mean_weight) |
    | `centre`, `variance` | their mean m, `sum (o - m)^2` |
    """
    rows, classes = part.products.shape
    shape = (ceil_divide(classes, BLOCK), rows)
    options = {"dtype": torch.float32, "device": part.products.device}
    found: dict[str, Tensor] = {}
    for key in ("shift", "total", *(key for name in names for key in _KEYS.get(name, ()))):
        found[key] = torch.empty(shape, **options)
    if "argmax" in names:
        found["argmax"] = torch.empty(shape, dtype=torch.int64, device=part.products.device)
    if "expectation" in names:
        assert part.values is not None
        found["expectation"] = torch.empty(*shape, part.values.shape[0], **options)
    options: dict[str, Any] = {f"{key}_out": found.get(key) for key in _OUTPUTS}
    options |= {**part.arguments(), "BLOCK": BLOCK, "num_warps": WARPS}
    _slice_statistics_kernel[shape](**options)
    return found


_OUTPUTS = (
    "shift", "total", "argmax", "entropy", "expectation", "complement_shift", "complement_total", "pointwise_sum",
    "target", "mean", "centre", "variance",
)  # fmt: skip
_KEYS = {
    "entropy": ("entropy",),
    "complement_lse": ("complement_shift", "complement_total"),
    "pointwise_sum": ("pointwise_sum",),
    "target": ("target",),
    "mean": ("mean",),
    "variance": ("centre", "variance"),
}
