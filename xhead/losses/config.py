"""Options that losses share: the engine, and for those with a softmax gradient its filter."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xhead.statistics import filter_threshold


@dataclass(frozen=True, kw_only=True)
class ExactConfig:
    """Options of a loss whose gradient is always exact.

    engine: `"auto"`, or one of `xhead.engines.names()`.
    """

    engine: str = "auto"

    def statistics_options(self) -> dict[str, Any]:
        """The options as arguments of `LazyLogits.statistics`."""
        return {"engine": self.engine}


@dataclass(frozen=True, kw_only=True)
class FilterConfig(ExactConfig):
    """Options of a loss whose gradient of `lse` may be filtered; see `LazyLogits.statistics` for what they mean."""

    filter_eps: float | str | None = "auto"
    compensate: bool = True
    filter_hidden_grad: bool = True
    filter_weight_grad: bool = True

    def __post_init__(self) -> None:
        filter_threshold(self.filter_eps, torch.float32)

    def statistics_options(self) -> dict[str, Any]:
        return {
            "filter_eps": self.filter_eps,
            "compensate": self.compensate,
            "filter_hidden_grad": self.filter_hidden_grad,
            "filter_weight_grad": self.filter_weight_grad,
            "engine": self.engine,
        }


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above_least: bool = False
) -> None:
    """Raise ValueError unless `value` is a finite number in `[least, most]`, for `above_least` in `(least, most]`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and least <= value <= most and not (above_least and value == least):
        return
    low = "" if least == -math.inf else f" {'above' if above_least else 'of at least'} {least:g}"
    high = "" if most == math.inf else f" and at most {most:g}"
    raise ValueError(f"{name} must be a finite number{low}{high}, got {value!r}")


def check_lazy(logits: Any) -> None:
    """Raise TypeError for logits that are a tensor: what asks them for statistics needs lazy ones."""
    if isinstance(logits, Tensor):
        raise TypeError(
            f"logits must be lazy, xhead.LazyLogits, got a tensor {tuple(logits.shape)}: make them of hidden states "
            "and weight, xhead.LazyLogits(hidden, weight); or take those of a patched model, which gives tensors where "
            "gradients are off unless it is patched with lazy_eval=True"
        )
