"""Functions of one logit whose sum over the classes is a statistic: their value, and their derivative for the gradient.

Each holds where the logit is -inf (a class that is ruled out) and where it is large: no intermediate overflows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Summand(NamedTuple):
    """`value(logits, *parameters)` and `slope(logits, *parameters)`, its derivative, both of the logits' shape."""

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()


def _softplus(logits: Tensor) -> Tensor:
    # F.softplus is linear above 20, which float64 can tell.
    return -F.logsigmoid(-logits)


def _stablemax(logits: Tensor) -> Tensor:
    return torch.where(logits >= 0, logits.clamp(min=0) + 1, 1 / (1 - logits.clamp(max=0)))


def _stablemax_slope(logits: Tensor) -> Tensor:
    return (1 - logits.clamp(max=0)).square_().reciprocal_()


def _asymmetric(logits: Tensor, gamma: float, margin: float) -> Tensor:
    x, log_rest = _shifted(logits, margin)
    return -(x**gamma) * log_rest


def _asymmetric_slope(logits: Tensor, gamma: float, margin: float) -> Tensor:
    # dx/do = sigmoid(o) sigmoid(-o) where x > 0; with u = 1 - x: x^g (-g log(u) / x + 1 / u) dx/do.
    x, log_rest = _shifted(logits, margin)
    positive, negative = torch.sigmoid(logits), torch.sigmoid(-logits)
    if margin == 0:
        return x**gamma * (positive - gamma * negative * log_rest)
    slope = x**gamma * (1 / (1 - x) - gamma * log_rest / x) * positive * negative
    return slope.masked_fill_(positive <= margin, 0.0)


def _shifted(logits: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """`x = max(sigmoid(o) - margin, 0)`, never quite 0 so that it can be divided by, and `log(1 - x)`."""
    x = (torch.sigmoid(logits) - margin).clamp(min=torch.finfo(logits.dtype).tiny)
    return x, torch.log1p(-x) if margin > 0 else F.logsigmoid(-logits)


def adjusted_cosine(logits: Tensor, scale: float, power: float) -> Tensor:
    """`s (2 ((o/s + 1) / 2)^t - 1)` of scaled cosines o, with s the scale and t the power."""
    # A cosine that is rounded to less than -1 has no power.
    return scale * (2 * (logits / (2 * scale) + 0.5).clamp(min=0) ** power - 1)


def _adjusted_cosine(logits: Tensor, scale: float, power: float, offset: float) -> Tensor:
    return _softplus(adjusted_cosine(logits, scale, power) + offset)


def _adjusted_cosine_slope(logits: Tensor, scale: float, power: float, offset: float) -> Tensor:
    spread = power * (logits / (2 * scale) + 0.5).clamp(min=0) ** (power - 1)
    return torch.sigmoid(adjusted_cosine(logits, scale, power) + offset) * spread


SUMMANDS: dict[str, Summand] = {
    "softplus": Summand(_softplus, torch.sigmoid),
    "stablemax": Summand(_stablemax, _stablemax_slope),
    "asymmetric": Summand(_asymmetric, _asymmetric_slope, ("gamma", "margin")),
    "adjusted_cosine": Summand(_adjusted_cosine, _adjusted_cosine_slope, ("scale", "power", "offset")),
}
