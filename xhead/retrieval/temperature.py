"""A softmax over scores that are no log-probabilities: one inverse temperature, fitted on held-out rows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from xhead.statistics import row_statistics

LARGEST = 1e6


def fit_inverse_temperature(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    tolerance: float = 1e-4,
) -> float:
    """The t of the softmax `p_k ~ exp(t o_k)` under which the targets are the most likely; 1/t is the temperature.

    The negative log-likelihood is convex in t with the slope `mean_i (E_p[o] - o_y)`, whose zero is bracketed and found
    by regula falsi, to `tolerance` relative: ten to twenty passes over N x V D, without N x V numbers.

    Raises ValueError where no finite positive factor is the best: targets that score below their row's mean on average,
    or that are all the largest. As in `row_statistics` for shapes and ranges.
    """
    if target.numel() == 0:
        raise ValueError("there are no rows to fit the temperature on")

    def slope(factor: float) -> float:
        scale = torch.tensor(factor, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
        with torch.enable_grad():
            scaled_bias = None if bias is None else bias.detach() * scale
            scaled = hidden.detach() * scale
            found = row_statistics(
                scaled, weight.detach(), ("lse", "target"), bias=scaled_bias, target=target, filter_eps=None
            )
            assert found.lse is not None and found.target is not None
            (gradient,) = torch.autograd.grad((found.lse - found.target).mean(), scale)
        return float(gradient)

    # Below this, a slope is rounding: a softmax that is all on one class has none.
    level = torch.finfo(hidden.dtype).eps * float((hidden * weight[target]).sum(-1).abs().mean())
    low, high = 1.0, 1.0
    at_low = at_high = slope(1.0)
    while at_high < level and high < LARGEST:
        low, at_low, high = high, at_high, 4 * high
        at_high = slope(high)
    while at_low > -level and low > 1 / LARGEST:
        high, at_high, low = low, at_low, low / 4
        at_low = slope(low)
    flat = at_low > -level
    if flat or at_high < level:
        place = "below their rows' mean" if flat else "above all others"
        raise ValueError(
            f"no temperature fits: the targets' scores lie {place}, so the likelihood is largest at an inverse "
            f"temperature {'of 0' if flat else 'without bound'}; fit on held-out rows of a trained head"
        )
    return _root(slope, low, at_low, high, at_high, tolerance)


def _root(
    slope: Callable[[float], float], low: float, at_low: float, high: float, at_high: float, tolerance: float
) -> float:
    """Where an increasing function is 0: the Illinois form of regula falsi, in the factor's logarithm."""
    left, right, before = math.log(low), math.log(high), 0
    middle = left
    while right - left > tolerance and at_low < at_high:
        last, middle = middle, (left * at_high - right * at_low) / (at_high - at_low)
        value = slope(math.exp(middle))
        if value == 0 or abs(middle - last) < tolerance / 10:
            break
        if value < 0:
            left, at_low = middle, value
            at_high = at_high / 2 if before < 0 else at_high
        else:
            right, at_high = middle, value
            at_low = at_low / 2 if before > 0 else at_low
        before = -1 if value < 0 else 1
    return math.exp(middle)
