"""Losses for noisy labels: normalised and reverse cross-entropy, their weighted sum, and clipped logits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xhead.lazy import LazyLogits
from xhead.losses import register
from xhead.losses.config import FilterConfig, check_number
from xhead.losses.probability import focused, target_missing


@dataclass(frozen=True)
class NormalizedCrossEntropyConfig(FilterConfig):
    """Options of `"nce"`."""


@register(
    "nce",
    NormalizedCrossEntropyConfig,
    formula="log p_y / sum_k log p_k",
    statistics=("lse", "target", "mean"),
    source="arXiv 2006.13554",
)
def normalized_cross_entropy_rows(logits: Any, labels: Tensor, config: NormalizedCrossEntropyConfig) -> Tensor:
    """`log p_y / sum_k log p_k = (lse - o_y) / (V (lse - mean_k o_k))`, in [0, 1].

    logits: LazyLogits (n, V), labels: (n,) -> (n,). Raises ValueError where V is 1: it is 0 / 0 there.
    """
    return _normalized(*_cross_entropy_and_spread(logits, labels, config), logits.shape[-1])


@dataclass(frozen=True)
class ReverseCrossEntropyConfig(FilterConfig):
    """Options of `"rce"`: label_floor in (0, 1), the probability that stands for 0 in a one-hot label."""

    label_floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_floor(self.label_floor)


@register(
    "rce",
    ReverseCrossEntropyConfig,
    formula="-log(label_floor) (1 - p_y)",
    statistics=("lse", "target"),
    source="symmetric cross-entropy, arXiv 1908.06112",
)
def reverse_cross_entropy_rows(logits: Any, labels: Tensor, config: ReverseCrossEntropyConfig) -> Tensor:
    """`-sum_k p_k log max(1[k = y], label_floor) = -log(label_floor) (1 - p_y)`.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    statistics = logits.statistics("lse", "target", target=labels, **config.statistics_options())
    return -math.log(config.label_floor) * target_missing(statistics.lse - statistics.target)


_ACTIVE, _PASSIVE = ("ce", "nce", "focal"), ("mae", "rce")


@dataclass(frozen=True)
class ActivePassiveConfig(FilterConfig):
    """Options of `"apl"`: weights alpha and beta (at least 0) of the active part, `"ce"`, `"nce"` or `"focal"` (with
    gamma), and of the passive part, `"mae"` or `"rce"` (with label_floor)."""

    alpha: float = 1.0
    beta: float = 1.0
    active: str = "nce"
    passive: str = "rce"
    gamma: float = 2.0
    label_floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0.0)
        check_number("beta", self.beta, 0.0)
        check_number("gamma", self.gamma, 0.0)
        _check_floor(self.label_floor)
        for role, value, known in (("active", self.active, _ACTIVE), ("passive", self.passive, _PASSIVE)):
            if value not in known:
                raise ValueError(f"{role} must be one of {', '.join(known)}, got {value!r}")


@register(
    "apl",
    ActivePassiveConfig,
    formula="alpha active + beta passive, active of ce, nce, focal, passive of mae, rce",
    statistics=("lse", "target", "mean"),
    source="arXiv 2006.13554",
)
def active_passive_rows(logits: Any, labels: Tensor, config: ActivePassiveConfig) -> Tensor:
    """`alpha active + beta passive`: one that raises the target alone, and one that also lowers another class.

    logits: LazyLogits (n, V), labels: (n,) -> (n,). Raises ValueError for `active="nce"` where V is 1.
    """
    if config.active == "nce":
        cross_entropy, spread = _cross_entropy_and_spread(logits, labels, config)
        active = _normalized(cross_entropy, spread, logits.shape[-1])
    else:
        statistics = logits.statistics("lse", "target", target=labels, **config.statistics_options())
        cross_entropy = statistics.lse - statistics.target
        active = cross_entropy if config.active == "ce" else focused(cross_entropy, config.gamma)
    factor = 2.0 if config.passive == "mae" else -math.log(config.label_floor)
    return config.alpha * active + config.beta * factor * target_missing(cross_entropy)


def _cross_entropy_and_spread(logits: Any, labels: Tensor, config: FilterConfig) -> tuple[Tensor, Tensor]:
    """`lse - o_y` and `lse - mean_k o_k`, each (n,)."""
    statistics = logits.statistics("lse", "target", "mean", target=labels, **config.statistics_options())
    return statistics.lse - statistics.target, statistics.lse - statistics.mean


def _normalized(cross_entropy: Tensor, spread: Tensor, classes: int) -> Tensor:
    if classes == 1:
        raise ValueError("normalised cross-entropy needs two classes or more, got logits of 1 class; use another loss")
    return cross_entropy / (classes * spread)


def _check_floor(label_floor: float) -> None:
    if not (isinstance(label_floor, float) and 0.0 < label_floor < 1.0):
        raise ValueError(f"label_floor must be a number between 0 and 1, both left out, got {label_floor!r}")


@dataclass(frozen=True)
class LogitClipConfig(FilterConfig):
    """Options of `"logit_clip"`: max_norm, above 0, the largest 2-norm of a row of logits.

    It has no default, since what is right grows with V: logits of norm t have a cross-entropy of
    `log(1 + (V - 1) exp(-t sqrt(V / (V - 1))))` or more.
    """

    max_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_norm is None:
            raise ValueError(
                'logit_clip needs max_norm, the largest 2-norm of a row of logits: loss="logit_clip", max_norm=... '
                "Below log(V) + 2 the loss cannot come under about 0.1"
            )
        check_number("max_norm", self.max_norm, 0.0, above_least=True)


@register(
    "logit_clip",
    LogitClipConfig,
    formula="-log p_y of o min(1, max_norm / \\|\\|o\\|\\|_2)",
    statistics=("mean", "variance", "lse", "target"),
    source="arXiv 2212.04055",
)
def logit_clip_rows(logits: Any, labels: Tensor, config: LogitClipConfig) -> Tensor:
    """Cross-entropy of `o min(1, max_norm / ||o||_2)`, the norm differentiated too.

    The convention is that of clipping a vector: rows of a smaller norm stay as they are, others are scaled to the norm
    `max_norm`. `||o||^2 = V (variance + mean^2)` has a closed form, so that the clipped logits are those of scaled
    hidden states.

    logits: LazyLogits (n, V), labels: (n,) -> (n,). Raises ValueError for logits that are not linear in the hidden
    states (a softcap). A bias makes the weight be copied once, (V, D + 1).
    """
    return logits.evaluate(lambda bound: _clipped_rows(bound, labels, config))


def _clipped_rows(logits: LazyLogits, labels: Tensor, config: LogitClipConfig) -> Tensor:
    assert config.max_norm is not None
    canonical = logits._at_hand()
    if canonical.softcap is not None:
        raise ValueError(
            f"logit_clip needs logits that are linear in the hidden states, got softcap={canonical.softcap}, which "
            "bounds them already; turn the model's softcap off, or use another loss"
        )
    moments = logits.statistics("mean", "variance", engine=config.engine)
    assert moments.mean is not None and moments.variance is not None
    square = logits.shape[-1] * (moments.variance + moments.mean.square())
    factor = config.max_norm * square.clamp(min=config.max_norm**2).rsqrt()
    hidden, weight = canonical.hidden * factor[..., None].to(canonical.hidden.dtype), logits.weight
    if canonical.bias is not None:
        hidden = torch.cat([hidden, factor[..., None].to(hidden.dtype)], -1)
        weight = torch.cat([weight, canonical.bias[:, None].to(weight.dtype)], 1)
    clipped = LazyLogits(hidden, weight, scale=canonical.scale)
    clipped._row_mask = logits._row_mask
    statistics = clipped.statistics("lse", "target", target=labels, **config.statistics_options())
    assert statistics.lse is not None and statistics.target is not None
    return statistics.lse - statistics.target
