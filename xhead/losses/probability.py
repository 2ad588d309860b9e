"""Losses that are functions of the target's probability `p = exp(o_y - lse)` alone.

The gradient of `f(p)` is that of cross-entropy times one number a row, `-f'(p) p`. All are written in the cross-entropy
`c = lse - o_y = -log p`, so that neither p near 0 nor p near 1 loses digits: `1 - p = -expm1(-c)`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xhead.losses import register
from xhead.losses.config import FilterConfig, check_number


def target_cross_entropy(logits: Any, labels: Tensor, config: FilterConfig) -> Tensor:
    """`lse - o_y` in nats. logits: LazyLogits (n, V), labels: (n,) -> (n,)"""
    statistics = logits.statistics("lse", "target", target=labels, **config.statistics_options())
    return statistics.lse - statistics.target


def target_missing(cross_entropy: Tensor) -> Tensor:
    """`1 - p`, from `-log p`. (n,) -> (n,)"""
    return -torch.expm1(-cross_entropy)


def focused(cross_entropy: Tensor, gamma: float) -> Tensor:
    """`-(1 - p)^gamma log p`, from `-log p`. (n,) -> (n,)"""
    # At p = 1 the power's derivative would be infinite times zero for gamma < 1.
    missing = target_missing(cross_entropy).clamp(min=torch.finfo(cross_entropy.dtype).tiny)
    return missing**gamma * cross_entropy


def comp_sum(cross_entropy: Tensor, tau: float) -> Tensor:
    """`(p^(tau - 1) - 1) / (1 - tau)`, at tau = 1 `-log p`, from `-log p`. (n,) -> (n,)"""
    return cross_entropy if tau == 1 else torch.expm1((1 - tau) * cross_entropy) / (1 - tau)


@dataclass(frozen=True)
class FocalConfig(FilterConfig):
    """Options of `"focal"`: gamma, at least 0; 0 is cross-entropy."""

    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 0.0)


@register(
    "focal",
    FocalConfig,
    formula="-(1 - p_y)^gamma log p_y",
    statistics=("lse", "target"),
    source="arXiv 1708.02002",
)
def focal_rows(logits: Any, labels: Tensor, config: FocalConfig) -> Tensor:
    """`-(1 - p_y)^gamma log p_y`. logits: LazyLogits (n, V), labels: (n,) -> (n,)"""
    return focused(target_cross_entropy(logits, labels, config), config.gamma)


@dataclass(frozen=True)
class Poly1Config(FilterConfig):
    """Options of `"poly1"`: epsilon, the first coefficient's excess; 0 is cross-entropy."""

    epsilon: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("epsilon", self.epsilon)


@register(
    "poly1",
    Poly1Config,
    formula="-log p_y + epsilon (1 - p_y)",
    statistics=("lse", "target"),
    source="PolyLoss, arXiv 2204.12511",
)
def poly1_rows(logits: Any, labels: Tensor, config: Poly1Config) -> Tensor:
    """`-log p_y + epsilon (1 - p_y)`. logits: LazyLogits (n, V), labels: (n,) -> (n,)"""
    cross_entropy = target_cross_entropy(logits, labels, config)
    return cross_entropy + config.epsilon * target_missing(cross_entropy)


@dataclass(frozen=True)
class GeneralizedCrossEntropyConfig(FilterConfig):
    """Options of `"gce"`: q in (0, 1]; towards 0 it is cross-entropy, at 1 half of `"mae"`."""

    q: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("q", self.q, 0.0, 1.0, above_least=True)


@register(
    "gce",
    GeneralizedCrossEntropyConfig,
    formula="(1 - p_y^q) / q",
    statistics=("lse", "target"),
    source="generalized cross-entropy, arXiv 1805.07836",
)
def generalized_cross_entropy_rows(logits: Any, labels: Tensor, config: GeneralizedCrossEntropyConfig) -> Tensor:
    """`(1 - p_y^q) / q`. logits: LazyLogits (n, V), labels: (n,) -> (n,)"""
    return comp_sum(target_cross_entropy(logits, labels, config), 1 + config.q)


@dataclass(frozen=True)
class MeanAbsoluteErrorConfig(FilterConfig):
    """Options of `"mae"`."""


@register(
    "mae",
    MeanAbsoluteErrorConfig,
    formula="sum_k |p_k - 1[k = y]| = 2 (1 - p_y)",
    statistics=("lse", "target"),
    source="arXiv 1712.09482",
)
def mean_absolute_error_rows(logits: Any, labels: Tensor, config: MeanAbsoluteErrorConfig) -> Tensor:
    """`sum_k |p_k - 1[k = y]| = 2 (1 - p_y)`. logits: LazyLogits (n, V), labels: (n,) -> (n,)"""
    return 2 * target_missing(target_cross_entropy(logits, labels, config))


@dataclass(frozen=True)
class CompSumConfig(FilterConfig):
    """Options of `"comp_sum"`: tau, at least 0. 0 is sum-exponential (unbounded: float32 overflows below p = e^-88),
    1 cross-entropy, between 1 and 2 generalised cross-entropy with `q = tau - 1`, 2 half of `"mae"`."""

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, 0.0)


@register(
    "comp_sum",
    CompSumConfig,
    formula="(p_y^(tau - 1) - 1) / (1 - tau), cross-entropy at tau = 1",
    statistics=("lse", "target"),
    source="arXiv 2304.07288",
)
def comp_sum_rows(logits: Any, labels: Tensor, config: CompSumConfig) -> Tensor:
    """`((1 + u)^(1 - tau) - 1) / (1 - tau)` with `u = sum_{k != y} exp(o_k - o_y)`, so `1 + u = 1 / p_y`.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    return comp_sum(target_cross_entropy(logits, labels, config), config.tau)
