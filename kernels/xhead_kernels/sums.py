"""Float32 sums of rows that lie where their half-precision result will be, with eight more bits of each beside it.

A sum is added to many times and its result has half the bytes, so the upper half of the float32 is kept in the result's
own memory and a quarter in a second tensor: 17 binary digits, of which a result of bfloat16 keeps 9. Without the second
tensor, the first is float32 and holds the sums themselves.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import ceil_divide

_LAUNCH: dict[str, Any] = {"ROWS": 32, "FEATURES": 128, "num_warps": 4}


@triton.jit
def load_sum(upper, lower, place, inside):
    """The float32 sums at some places, 0 outside."""
    # What follows a return is compiled, too: the other way has to be in an else.
    if lower is None:
        return tl.load(upper + place, mask=inside, other=0.0)
    else:
        high = tl.load(upper + place, mask=inside, other=0).to(tl.int32)
        low = tl.load(lower + place, mask=inside, other=0).to(tl.int32)
        return ((high << 16) | (low << 8)).to(tl.float32, bitcast=True)


@triton.jit
def store_sum(upper, lower, place, value, inside):
    """Keep 24 bits of the float32 sums, rounded to the nearest."""
    if lower is None:
        tl.store(upper + place, value, mask=inside)
    else:
        bits = value.to(tl.int32, bitcast=True)
        # Rounding up would carry a NaN of all ones into the sign.
        bits = tl.where(value == value, bits + 0x80, bits)
        tl.store(upper + place, (bits >> 16).to(tl.int16), mask=inside)
        tl.store(lower + place, ((bits >> 8) & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def store_first(upper, place, value, inside):
    """Begin the sums, before there is a second tensor: rounded to the upper half where there will be one."""
    if upper.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        tl.store(upper + place, (bits >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(upper + place, value, mask=inside)


@triton.jit
def _finish_kernel(
    upper,  # (N, D)
    lower,  # (N, D)
    out,  # (N, D), which may be the memory of upper
    weight,  # (V, D)
    target,  # (N,)
    lone,  # (N,)
    rows,
    size,
    weight_stride,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = (row < rows)[:, None] & (feature < size)[None, :]
    place = row.to(tl.int64)[:, None] * size + feature[None, :]
    value = load_sum(upper, lower, place, inside)
    if lone is not None:
        share = tl.load(lone + row, mask=row < rows, other=0.0)
        wanted = tl.load(target + row, mask=row < rows, other=0).to(tl.int64)
        # A row of the weight that is not finite must not reach the rows that do not name it.
        named = inside & (share != 0)[:, None]
        of_target = tl.load(weight + wanted[:, None] * weight_stride + feature[None, :], mask=named, other=0.0)
        value += share[:, None] * of_target.to(tl.float32)
    tl.store(out + place, value, mask=inside)


def finish(
    out: Tensor,  # (N, D), written
    sums: Tensor,  # (N, D), which may be out itself
    lower: Tensor | None,  # (N, D) uint8
    weight: Tensor,  # (V, D)
    target: Tensor | None,  # (N,)
    lone: Tensor | None,  # (N,) float32
) -> None:
    """The sums, plus `lone_i weight[target_i]`, rounded to out's precision."""
    rows, size = out.shape
    _finish_kernel[(ceil_divide(rows, _LAUNCH["ROWS"]), ceil_divide(size, _LAUNCH["FEATURES"]))](
        upper_of(sums, half=lower is not None),
        lower,
        out,
        weight,
        target,
        lone,
        rows,
        size,
        weight.stride(0),
        **_LAUNCH,
    )


def upper_of(out: Tensor, *, half: bool) -> Tensor:
    """What the kernels take as `upper` for sums whose result is `out`; half: kept in two tensors."""
    return out.view(torch.int16) if half else out
