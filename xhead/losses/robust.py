"""Losses for noisy labels: normalised and reverse cross-entropy, their weighted sum, and clipped logits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead import pointwise
from xhead.lazy import LazyLogits
from xhead.losses import register
from xhead.losses.config import FilterConfig, check_number
from xhead.losses.probability import focused, target_cross_entropy, target_missing
from xhead.losses.tempered import RowScaled
from xhead.losses.vectors import in_row_blocks


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


_ACTIVE, _PASSIVE = ("ce", "nce", "focal", "nfl"), ("mae", "nmae", "rce", "nrce")


@dataclass(frozen=True)
class ActivePassiveConfig(FilterConfig):
    """Options of `"apl"`: weights alpha and beta (at least 0) of the active part, `"ce"`, `"nce"`, `"focal"` or `"nfl"`
    (the last two with gamma), and of the passive part, `"mae"`, `"nmae"`, `"rce"` (with label_floor) or `"nrce"`.

    An n in front stands for normalised: divided by the sum of the same loss over all labels that the row could have.
    Of mae and rce that sum is a number, and what is left of both is `(1 - p_y) / (V - 1)`.
    """

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
    formula="alpha active + beta passive, active of ce, nce, focal, nfl, passive of mae, nmae, rce, nrce",
    statistics=("lse", "target", "mean"),
    source="arXiv 2006.13554",
)
def active_passive_rows(logits: Any, labels: Tensor, config: ActivePassiveConfig) -> Tensor:
    """`alpha active + beta passive`: one that raises the target alone, and one that also lowers another class.

    The normalised focal loss is `f(p_y) / sum_k f(p_k)` with `f(p) = -(1 - p)^gamma log p`, whose focusing weights are
    differentiated too. It is no function of statistics: its logits are built for blocks of rows, and again in the
    backward.

    logits: LazyLogits (n, V), labels: (n,) -> (n,). Raises ValueError for a normalised part where V is 1.
    """
    classes = logits.shape[-1]
    if classes == 1 and (config.active.startswith("n") or config.passive.startswith("n")):
        raise ValueError(_ONE_CLASS)
    if config.active == "nce":
        cross_entropy, spread = _cross_entropy_and_spread(logits, labels, config)
        active = _normalized(cross_entropy, spread, classes)
    elif config.active == "nfl":
        cross_entropy, active = _cross_entropy_and_normalized_focal(logits, labels, config.gamma)
    else:
        cross_entropy = target_cross_entropy(logits, labels, config)
        active = cross_entropy if config.active == "ce" else focused(cross_entropy, config.gamma)
    factor = {"mae": 2.0, "rce": -math.log(config.label_floor)}.get(config.passive, 1 / max(classes - 1, 1))
    return config.alpha * active + config.beta * factor * target_missing(cross_entropy)


def _cross_entropy_and_normalized_focal(logits: Any, labels: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """`-log p_y` and `f(p_y) / sum_k f(p_k)`, each (n,)."""

    def rows(bound: LazyLogits) -> Tensor:
        bound = bound.whole()
        hidden, factors = bound._terms[0].hidden, bound._factors()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        steps = tuple(step for step in bound._steps if step[0] != "cast")

        def block(hidden: Tensor, labels: Tensor) -> Tensor:
            bias = None if factors.bias is None else factors.bias.to(dtype)
            o = pointwise.replay(steps, F.linear(hidden.to(dtype), factors.weight.to(dtype), bias))
            cross_entropy = -o.log_softmax(-1)
            focal = focused(cross_entropy, gamma)
            own = labels[:, None]
            share = focal.gather(1, own) / focal.sum(-1, keepdim=True)
            return torch.cat([cross_entropy.gather(1, own), share], 1)

        with torch.autocast(hidden.device.type, enabled=False):
            return in_row_blocks(block, (hidden, labels), _NUMBERS_A_LOGIT * factors.weight.shape[0])

    cross_entropy, share = logits.evaluate(rows).unbind(1)
    return cross_entropy, share


_NUMBERS_A_LOGIT = 4  # of the tensors that a block's focal loss and its gradient hold at a time


def _cross_entropy_and_spread(logits: Any, labels: Tensor, config: FilterConfig) -> tuple[Tensor, Tensor]:
    """`lse - o_y` and `lse - mean_k o_k`, each (n,)."""
    statistics = logits.statistics("lse", "target", "mean", target=labels, **config.statistics_options())
    return statistics.lse - statistics.target, statistics.lse - statistics.mean


def _normalized(cross_entropy: Tensor, spread: Tensor, classes: int) -> Tensor:
    if classes == 1:
        raise ValueError(_ONE_CLASS)
    return cross_entropy / (classes * spread)


_ONE_CLASS = "a normalised loss needs two classes or more, got logits of 1 class; use another loss"


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
    formula="-log p_y of o min(1, max_norm / ||o||_2)",
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
    scaled = RowScaled(logits, "logit_clip")
    moments = logits.statistics("mean", "variance", engine=config.engine)
    assert moments.mean is not None and moments.variance is not None
    square = logits.shape[-1] * (moments.variance + moments.mean.square())
    clipped = scaled.times(config.max_norm * square.clamp(min=config.max_norm**2).rsqrt())
    statistics = clipped.statistics("lse", "target", target=labels, **config.statistics_options())
    assert statistics.lse is not None and statistics.target is not None
    return statistics.lse - statistics.target
