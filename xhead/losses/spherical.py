"""Spherical losses of a plain weight matrix: the Z-loss, log-Taylor and log-spherical softmax, squared error.

They see the V logits of a row only through mean, variance and the targets' logits, so neither direction passes over
N x V numbers: mean and variance of all rows come from the weight's centred Gram matrix, see docs/spherical.md.

The Z-loss here is a loss on standardised logits. What PaLM calls z-loss, a penalty on lse^2, is `lse_penalty`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xhead.losses import register
from xhead.losses.config import ExactConfig, check_number
from xhead.losses.multilabel import target_logits
from xhead.losses.spherical_family import (
    LogSpherical,
    LogTaylor,
    SphericalLoss,
    SquaredError,
    ZLoss,
    spherical_loss,
)

_STATISTICS = ("mean", "variance", "target")


@dataclass(frozen=True)
class ZLossConfig(ExactConfig):
    """Options of `"zloss"`: a, above 0, how fast a target beyond the margin stops mattering; b, that margin in standard
    deviations over the classes; eps, at least 0, added to the variance."""

    a: float = 1.0
    b: float = 0.0
    eps: float = 1e-12
    member: ZLoss = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("a", self.a, 0.0, above_least=True)
        check_number("b", self.b)
        check_number("eps", self.eps, 0.0)
        object.__setattr__(self, "member", ZLoss(sharpness=self.a, margin=self.b, eps=self.eps))


@register(
    "zloss",
    ZLossConfig,
    formula="softplus(a (b - z)) / a, z = (o_y - mean_k o_k) / std_k o_k; not PaLM's penalty",
    statistics=_STATISTICS,
    source="arXiv 1604.08859",
)
def zloss_rows(logits: Any, labels: Tensor, config: ZLossConfig) -> Tensor:
    """`softplus(a (b - z)) / a`, `z = (o_y - mean) / sqrt(variance + eps)`, summed over the row's labels.

    Not a likelihood. Invariant to a positive scale and a shift of the logits; z is at most `sqrt(V - 1)`.
    Arguments, shapes and errors as `mse_rows`.
    """
    return _rows(logits, labels, config.member, config)


@dataclass(frozen=True)
class LogTaylorConfig(ExactConfig):
    """Options of `"log_taylor"`."""


@register(
    "log_taylor",
    LogTaylorConfig,
    formula="-log p_y, p_k = (1 + o_k + o_k^2/2) / sum_j (1 + o_j + o_j^2/2)",
    statistics=_STATISTICS,
    source="arXiv 1511.05042",
)
def log_taylor_rows(logits: Any, labels: Tensor, config: LogTaylorConfig) -> Tensor:
    """`-log p_y` of the Taylor softmax `p_k = (1 + o_k + o_k^2/2) / sum_j (1 + o_j + o_j^2/2)`, summed over the labels.

    Arguments, shapes and errors as `mse_rows`.
    """
    return _rows(logits, labels, LogTaylor(), config)


@dataclass(frozen=True)
class LogSphericalConfig(ExactConfig):
    """Options of `"log_spherical"`: eps, above 0, added to every o_k^2."""

    eps: float = 1e-2
    member: LogSpherical = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "member", LogSpherical(eps=self.eps))


@register(
    "log_spherical",
    LogSphericalConfig,
    formula="-log p_y, p_k = (o_k^2 + eps) / sum_j (o_j^2 + eps)",
    statistics=_STATISTICS,
    source="arXiv 1511.05042",
)
def log_spherical_rows(logits: Any, labels: Tensor, config: LogSphericalConfig) -> Tensor:
    """`-log p_y` of the spherical softmax `p_k = (o_k^2 + eps) / sum_j (o_j^2 + eps)`, summed over the row's labels.

    Blind to the sign of a logit: the most likely class has the largest `|o_k|`.
    Arguments, shapes and errors as `mse_rows`.
    """
    return _rows(logits, labels, config.member, config)


@dataclass(frozen=True)
class SquaredErrorConfig(ExactConfig):
    """Options of `"mse"`."""


@register(
    "mse",
    SquaredErrorConfig,
    formula="sum_k (o_k - 1[k in labels])^2",
    statistics=_STATISTICS,
    source="arXiv 1412.7091",
)
def mse_rows(logits: Any, labels: Tensor, config: SquaredErrorConfig) -> Tensor:
    """`sum_k (o_k - 1[k in labels])^2`: summed over the classes, not averaged.

    Args:
        logits: LazyLogits (n, V).
        labels: (n,), one right class a row; (n, K) classes, -1 for none; or sparse CSR (n, V). A class that is named
            twice in a row counts once.

    Returns: (n,). Raises RuntimeError for labels of another shape, IndexError for a class out of range.
    """
    return _rows(logits, labels, SquaredError(), config)


def log_probability(
    logits: Any,  # LazyLogits (n, V)
    classes: Tensor,  # (n,) or (n, J) int64
    loss: str = "log_taylor",
    **options: Any,
) -> Tensor:
    """`log p_k` of the classes named, under the softmax of `"log_taylor"` or `"log_spherical"`: shaped as `classes`.

    The normaliser comes from mean and variance, so a row costs D^2 and D a class, whatever V is. options: as the
    loss's, `eps` and `engine`.

    Raises ValueError for another loss, which defines no probability, IndexError for a class outside `[0, V)`.
    """
    engine = options.pop("engine", "auto")
    member = spherical_loss(loss, **options)
    if not member.is_likelihood:
        raise ValueError(f'loss must be "log_taylor" or "log_spherical", which define probabilities; got {loss!r}')
    s = logits.statistics("mean", "variance", engine=engine)
    wide = classes if classes.ndim == 2 else classes[:, None]
    row = torch.arange(wide.shape[0], device=wide.device).repeat_interleave(wide.shape[1])
    scores = logits[row].statistics("target", target=wide.reshape(-1)).target
    row = row.to(s.mean.device)
    return -member.rows(s.mean[row], s.variance[row], scores[:, None], logits.shape[-1]).reshape(classes.shape)


def _rows(logits: Any, labels: Tensor, member: SphericalLoss, config: ExactConfig) -> Tensor:
    """The member's loss of every row. labels: (n,), (n, K) or sparse CSR (n, V) -> (n,)"""
    options, classes = config.statistics_options(), logits.shape[-1]
    if labels.layout == torch.strided and labels.ndim == 1:
        s = logits.statistics(*_STATISTICS, target=labels, **options)
        return member.rows(s.mean, s.variance, s.target[:, None], classes)
    row, position, scores = target_logits(logits, labels)
    s = logits.statistics("mean", "variance", **options)
    widest = int(position.max()) + 1 if position.numel() else 0
    target = scores.new_zeros(logits.shape[0], widest).index_put((row, position), scores)
    values = torch.zeros_like(target).index_put((row, position), torch.ones_like(scores))
    return member.rows(s.mean, s.variance, target, classes, values)
