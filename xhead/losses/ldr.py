"""Label-distributionally robust losses: a log-sum-exp of margins at one temperature, or at one for each row.

Source: arXiv 2112.14869.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.losses import register
from xhead.losses.config import FilterConfig, check_number
from xhead.losses.tempered import RowScaled


@dataclass(frozen=True)
class LabelDistributionConfig(FilterConfig):
    """Options of `"ldr_kl"`: temperature, above 0 (towards 0 the multi-class hinge, at 1 without a margin cross-entropy
    less log V, towards infinity the average margin), and margin, what a class other than the target must stay below it.

    With a margin other than 0 the gradient is not filtered.
    """

    temperature: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, 0.0, above_least=True)
        check_number("margin", self.margin)


@register(
    "ldr_kl",
    LabelDistributionConfig,
    formula="t log(1/V sum_k exp((o_k - o_y + margin 1[k != y]) / t))",
    statistics=("lse", "target", "complement_lse"),
    source="arXiv 2112.14869",
)
def label_distribution_rows(logits: Any, labels: Tensor, config: LabelDistributionConfig) -> Tensor:
    """`t log(1/V sum_k exp((o_k - o_y + margin 1[k != y]) / t))`, t the temperature; down to `-t log V`.

    With a margin, the others are summed without the target, whose own term is 1: where the margin is met, what is left
    of them is smaller than what a difference of log-sum-exps could resolve.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    return _robust_rows(logits / config.temperature, labels, config.temperature, config)


def _robust_rows(tempered: Any, labels: Tensor, t: Any, config: LabelDistributionConfig) -> Tensor:
    """tempered: the logits divided by the temperature t, a number or (n,)"""
    options, uniform = config.statistics_options(), math.log(tempered.shape[-1])
    if config.margin == 0:
        s = tempered.statistics("lse", "target", target=labels, **options)
        return t * (s.lse - s.target - uniform)
    s = tempered.statistics("complement_lse", "target", target=labels, columns=labels[:, None], **options)
    others = s.complement_lse - s.target + config.margin / t
    # F.softplus is linear above 20, which float64 can tell.
    return t * (-F.logsigmoid(-others) - uniform)


@dataclass(frozen=True)
class AdaptiveLabelDistributionConfig(LabelDistributionConfig):
    """Options of `"aldr_kl"`: temperature, below which a row's own may fall, alpha, above 1, how firmly it is held,
    and margin as in `"ldr_kl"`. A row's temperature lies between `(1 - 1 / alpha) temperature` and `temperature`.

    It is found by at most `steps` passes over the logits without a gradient, each over the rows whose temperature
    the last one moved by more than `tolerance` times `temperature`.
    """

    alpha: float = 2.0
    steps: int = 8
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 1.0, above_least=True)
        check_number("tolerance", self.tolerance, 0.0)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")


@register(
    "aldr_kl",
    AdaptiveLabelDistributionConfig,
    formula="ldr_kl at the row's own temperature t, less alpha log(V) (t - temperature)^2 / (2 temperature)",
    statistics=("entropy", "lse", "target", "complement_lse"),
    source="arXiv 2112.14869",
)
def adaptive_label_distribution_rows(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: AdaptiveLabelDistributionConfig,
) -> Tensor:
    """`ldr_kl(t) - a/2 (t - t0)^2` at a maximum over t, `a = alpha log(V) / t0`, t0 the option temperature: (n,).

    There `t = t0 - KL(w, uniform) / a` with `w = softmax((o - o_y + margin 1[k != y]) / t)`. Where the model is at odds
    with itself, w is even and the temperature stays high; where it is sure, of the label or of another class, it falls.
    Since the derivative for t is 0, the gradient for the logits is that of `ldr_kl` at this temperature.

    The paper takes one step of that equation whenever a sample comes up, from the temperature of its last visit, and
    keeps one a sample. Here the steps are taken at once, from t0 on: they fall monotonically, towards the largest
    solution, and no state and no number of the sample is needed. The authors' experiments also divide
    a row of logits by its mean absolute value, which this does not.

    Raises ValueError for logits that are not linear in the hidden states (a softcap), and for those of 1 class. A bias
    makes the weight be copied once, (V, D + 1).
    """
    if logits.shape[-1] == 1:
        raise ValueError("aldr_kl needs two classes or more, got logits of 1 class; use another loss")

    def rows(bound: Any) -> Tensor:
        scaled = RowScaled(bound, "aldr_kl")
        with torch.no_grad():
            t = _temperatures(scaled, labels, config)
        pull = config.alpha * math.log(bound.shape[-1]) / (2 * config.temperature)
        return _robust_rows(scaled.times(1 / t), labels, t, config) - pull * (t - config.temperature).square()

    return logits.evaluate(rows)


def _temperatures(scaled: RowScaled, labels: Tensor, config: AdaptiveLabelDistributionConfig) -> Tensor:
    """The temperature of each row: (n,)."""
    uniform = math.log(scaled.classes)
    dtype = torch.promote_types(scaled.hidden.dtype, torch.float32)
    t = torch.full(labels.shape, float(config.temperature), dtype=dtype, device=labels.device)
    # Which rows still move is not known to a compiled graph, which takes all steps with all rows.
    moving = None
    for _ in range(config.steps):
        old = t if moving is None else t[moving]
        own = labels if moving is None else labels[moving]
        divergence = uniform - _entropy(scaled.times(1 / old, moving), own, config.margin / old, config)
        new = config.temperature * (1 - divergence.clamp(0, uniform) / (config.alpha * uniform))
        t = new if moving is None else t.index_copy(0, moving, new)
        if not torch.compiler.is_compiling():
            still = (new - old).abs() > config.tolerance * config.temperature
            moving = still.nonzero().squeeze(1) if moving is None else moving[still]
            if not len(moving):
                break
    return t


def _entropy(tempered: Any, labels: Tensor, margin: Tensor, config: AdaptiveLabelDistributionConfig) -> Tensor:
    """Entropy a row of the softmax in which all logits but the target's have been raised by `margin` (n,)."""
    if config.margin == 0:
        return tempered.statistics("entropy", engine=config.engine).entropy
    names = ("entropy", "complement_lse", "target")
    s = tempered.statistics(*names, target=labels, columns=labels[:, None], engine=config.engine)
    # The choice between target and rest is taken out, and put in again with the margin; what is left is the rest's own
    # entropy times its probability.
    log_odds = s.complement_lse - s.target
    raised = log_odds + margin
    grown = torch.exp(F.logsigmoid(raised) - F.logsigmoid(log_odds))
    return _binary_entropy(raised) + grown * (s.entropy - _binary_entropy(log_odds)).clamp(min=0)


def _binary_entropy(log_odds: Tensor) -> Tensor:
    return -(torch.sigmoid(log_odds) * F.logsigmoid(log_odds) + torch.sigmoid(-log_odds) * F.logsigmoid(-log_odds))
