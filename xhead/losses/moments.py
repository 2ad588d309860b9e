"""Losses that add to cross-entropy a function of the logits' moments, of the largest logit or of `lse`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xhead.losses import register
from xhead.losses.config import FilterConfig, check_number


@dataclass(frozen=True)
class SquentropyConfig(FilterConfig):
    """Options of `"squentropy"`."""


@register(
    "squentropy",
    SquentropyConfig,
    formula="-log p_y + 1/(V - 1) sum_{k != y} o_k^2",
    statistics=("lse", "target", "mean", "variance"),
    source="arXiv 2302.03952",
)
def squentropy_rows(logits: Any, labels: Tensor, config: SquentropyConfig) -> Tensor:
    """`lse - o_y + 1/(V - 1) sum_{k != y} o_k^2`, the sum from `sum_k o_k^2 = V (variance + mean^2)`.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    s = logits.statistics("lse", "target", "mean", "variance", target=labels, **config.statistics_options())
    classes = logits.shape[-1]
    others = classes * (s.variance + s.mean.square()) - s.target.square()
    return s.lse - s.target + others / max(classes - 1, 1)


@dataclass(frozen=True)
class MaxSupConfig(FilterConfig):
    """Options of `"maxsup"`: alpha, at least 0, the weight of the suppression."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0.0)


@register(
    "maxsup",
    MaxSupConfig,
    formula="-log p_y + alpha (max_k o_k - mean_k o_k)",
    statistics=("lse", "target", "mean", "argmax"),
    source="arXiv 2502.15798",
)
def maxsup_rows(logits: Any, labels: Tensor, config: MaxSupConfig) -> Tensor:
    """`lse - o_y + alpha (max_k o_k - mean_k o_k)`: label smoothing with the largest logit in place of the target's.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    s = logits.statistics("lse", "target", "mean", "argmax", target=labels, **config.statistics_options())
    # The statistic `max` has no gradient; gathered by its class, the largest logit has, without a second pass.
    largest = logits.statistics("target", target=s.argmax).target
    return s.lse - s.target + config.alpha * (largest - s.mean)


@dataclass(frozen=True)
class LsePenaltyConfig(FilterConfig):
    """Options of `"lse_penalty"`: coefficient, at least 0."""

    coefficient: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("coefficient", self.coefficient, 0.0)


@register(
    "lse_penalty",
    LsePenaltyConfig,
    formula="coefficient lse^2, to add to a loss; `cce` has it as an option",
    statistics=("lse",),
    source="PaLM, arXiv 2204.02311",
)
def lse_penalty_rows(logits: Any, labels: Tensor, config: LsePenaltyConfig) -> Tensor:
    """`coefficient lse^2`, which keeps the softmax's normaliser near 1; it does not look at the labels.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    return config.coefficient * logits.statistics("lse", **config.statistics_options()).lse.square()
