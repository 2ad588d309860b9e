"""A slice of the classes: the products of all rows with some rows of the weight, and what makes logits of them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.tile import capped


class Slice(NamedTuple):
    """`hidden @ weight.T` for n rows and the classes `first_class` to `first_class + c`, and what goes with them."""

    products: Tensor  # (n, c) float32, n at most 65,535: rows are the grid's second dimension
    first_class: int
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None
    target: Tensor | None = None  # (n,) class indices, or (n, c) probabilities
    values: Tensor | None = None  # (M, V) float32: classes are neighbours, as they are in a row of products
    mean_weight: Tensor | None = None  # (V,) float32
    row_offsets: Tensor | None = None  # (n + 1,), with `columns` the sets of columns in compressed-row form
    columns: Tensor | None = None  # (sum of the sets' sizes,), ascending in each row
    pointwise: str | None = None
    pointwise_parameters: tuple[float, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """What both kernels on slices take, by parameter."""
        first, second, third = (*self.pointwise_parameters, 0.0, 0.0, 0.0)[:3]
        return {
            "products": self.products,
            "bias": self.bias,
            "target": self.target,
            "values": self.values,
            "mean_weight": self.mean_weight,
            "row_offsets": self.row_offsets,
            "columns": self.columns,
            "first_class": self.first_class,
            "rows": self.products.shape[0],
            "classes": self.products.shape[1],
            "products_stride": self.products.stride(0),
            "target_stride": 0 if self.target is None else self.target.stride(0),
            "scale": self.scale,
            "softcap": self.softcap,
            "first": first,
            "second": None if self.pointwise == "asymmetric" and second <= 0 else second,
            "third": third,
            "POINTWISE": self.pointwise,
            "SOFT_TARGET": self.target is not None and self.target.ndim == 2,
            "values_count": 0 if self.values is None else self.values.shape[0],
            "values_stride": 0 if self.values is None else self.values.stride(0),
        }


@triton.jit
def slice_logits(products, bias, row, local, first_class, classes, products_stride, scale, softcap):
    """`cap(scale * (product + bias))` of one row; -inf outside the slice. local: (BLOCK,) columns of the slice"""
    inside = local < classes
    logits = tl.load(products + row.to(tl.int64) * products_stride + local, mask=inside, other=0.0)
    if bias is not None:
        logits += tl.load(bias + first_class + local, mask=inside, other=0.0).to(tl.float32)
    logits *= scale
    if softcap is not None:
        logits = capped(logits, softcap)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def in_columns(column, row_offsets, columns, row, BLOCK: tl.constexpr):
    """Which classes are in the row's set. column: (BLOCK,) neighbouring classes"""
    found = tl.zeros((BLOCK,), dtype=tl.int1)
    lowest = tl.min(column, 0)
    for entry in range(tl.load(row_offsets + row), tl.load(row_offsets + row + 1)):
        listed = tl.load(columns + entry)
        if (listed >= lowest) & (listed < lowest + BLOCK):
            found = found | (column == listed)
    return found
