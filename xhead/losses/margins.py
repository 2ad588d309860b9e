"""Margin softmax losses: cross-entropy of scaled cosines, where the target's has to win by a margin.

With `c_j = cos(hidden, weight_j)` and `c'_y` what the margin makes of the target's cosine, a row's loss is

    -log( exp(s c'_y) / (exp(s c'_y) + sum_{j != y} exp(s c_j)) ) = softplus( log sum_{j != y} exp(s c_j) - s c'_y )

so that it takes two numbers a row, and the gradient is exact, the margin's derivative included.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.losses import register
from xhead.losses.cosines import CosineConfig, Cosines, cosines, subcenter_cosines, unit_logits
from xhead.losses.vectors import check_positive
from xhead.statistics import filter_threshold


@dataclass(frozen=True)
class NormalisedSoftmaxConfig(CosineConfig):
    """Options of the loss `"normalised_softmax"`: those of `CosineConfig`, and

    Args:
        scale: 1 / temperature. The loss of V classes cannot go below `log(1 + (V - 1) exp(-s V / (V - 1)))`, so s has
            to grow like log V.
        filter_eps: see `xhead.LazyLogits.statistics`.
    """

    scale: float = 20.0
    filter_eps: float | str | None = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        filter_threshold(self.filter_eps, torch.float32)


@register(
    "normalised_softmax",
    NormalisedSoftmaxConfig,
    formula="-log p_y of o = cos(h, w) / T",
    statistics=("lse", "target"),
    source="NormFace and others, arXiv 1811.12649",
)
def normalised_softmax(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: NormalisedSoftmaxConfig,
) -> Tensor:
    """Cross-entropy of scaled cosines a row, without a margin: `log sum_j exp(s c_j) - s c_y`, in nats: (n,).

    Source: arXiv 1811.12649.
    """

    def rows(bound: Any) -> Tensor:
        with torch.autocast(bound.device.type, enabled=False):
            scaled, places = unit_logits(bound, labels, config)
            found: Any = scaled.statistics(
                "lse", "target", target=places, filter_eps=config.filter_eps, engine=config.engine
            )
        return found.lse - found.target

    return logits.evaluate(rows)


@dataclass(frozen=True)
class CosFaceConfig(CosineConfig):
    """Options of the loss `"cosface"`: those of `CosineConfig`, and the margin m, in units of the cosine."""

    margin: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_margin("margin", self.margin, 2.0)


@register(
    "cosface",
    CosFaceConfig,
    formula="-log p_y of o = s cos(h, w), the label's s (cos - margin)",
    statistics=("target", "complement_lse"),
    source="arXiv 1801.09414",
)
def cosface(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: CosFaceConfig,
) -> Tensor:
    """Additive cosine margin: `c'_y = c_y - m`, one loss a row: (n,). Source: CosFace (arXiv 1801.09414)."""
    return _margin_rows(logits, config, lambda bound: cosines(bound, labels, config), lambda c: c - config.margin)


@dataclass(frozen=True)
class ArcFaceConfig(CosineConfig):
    """Options of the loss `"arcface"`: those of `CosineConfig`, and

    Args:
        margin: m, in radians.
        exact_grad: False leaves out the margin's derivative `sin(theta + m) / sin(theta)`, as a much used
            implementation of the paper's authors does; the loss itself is the same.
    """

    margin: float = 0.5
    exact_grad: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_margin("margin", self.margin, math.pi)

    def with_margin(self, cosine: Tensor) -> Tensor:
        moved = _add_angle(cosine, cosine.new_tensor(self.margin))
        return moved if self.exact_grad else cosine + (moved - cosine).detach()


@register(
    "arcface",
    ArcFaceConfig,
    formula="-log p_y of o = s cos(h, w), the label's s cos(angle + margin)",
    statistics=("target", "complement_lse"),
    source="arXiv 1801.07698",
)
def arcface(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: ArcFaceConfig,
) -> Tensor:
    """Additive angular margin: `c'_y = cos(theta_y + m)`, one loss a row: (n,).

    Beyond `theta_y > pi - m`, where that would rise again, `c'_y = c_y - m sin(m)`. Source: ArcFace (arXiv 1801.07698).
    """
    return _margin_rows(logits, config, lambda bound: cosines(bound, labels, config), config.with_margin)


@dataclass(frozen=True)
class SubcenterArcFaceConfig(ArcFaceConfig):
    """Options of the loss `"subcenter_arcface"`: those of `ArcFaceConfig` but for `engine`, which has no say here, and

    Args:
        sub_centers: K, rows of the weight a class, next to one another.
    """

    sub_centers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sub_centers < 1:
            raise ValueError(f"sub_centers must be a number of rows a class, 1 or more, got {self.sub_centers!r}")
        if self.engine != "auto":
            raise ValueError(f'subcenter_arcface takes no row statistics: engine must be "auto", got {self.engine!r}')


@register(
    "subcenter_arcface",
    SubcenterArcFaceConfig,
    formula="arcface of the largest cosine of a class's K rows",
    statistics=("target", "complement_lse"),
    source="sub-center ArcFace, ECCV 2020",
)
def subcenter_arcface(
    logits: Any,  # LazyLogits (n, K C) for C classes
    labels: Tensor,  # (n,), in [0, C)
    config: SubcenterArcFaceConfig,
) -> Tensor:
    """ArcFace with `c_j = max_k cos(hidden, weight_jk)` over K rows a class, one loss a row: (n,).

    Blocks of rows are computed one after another, and again in the backward. Source: Sub-center ArcFace (Deng et al.,
    ECCV 2020).
    """
    per_class = config.sub_centers
    return _margin_rows(
        logits, config, lambda bound: subcenter_cosines(bound, labels, config, per_class), config.with_margin
    )


class RunningNorms:
    """Mean and standard deviation of hidden states' norms, by an exponential moving average over the batches."""

    def __init__(self, rate: float):
        self.rate = rate
        self.moments: Tensor | None = None  # (2,)

    def observe(self, norm: Tensor) -> Tensor:
        """(mean, deviation) with these norms taken in; they are remembered where gradients are enabled.

        norm: (n,) -> (2,)
        """
        if not norm.numel():
            return norm.new_zeros(2)
        batch = torch.stack([norm.mean(), norm.std(correction=min(1, norm.numel() - 1))])
        moments = batch if self.moments is None else torch.lerp(self.moments.to(batch), batch, self.rate)
        if torch.is_grad_enabled():
            self.moments = moments
        return moments


@dataclass(frozen=True)
class AdaFaceConfig(CosineConfig):
    """Options of the loss `"adaface"`: those of `CosineConfig`, and

    Args:
        margin: m.
        concentration: h, how far a norm of one standard deviation above the mean moves the margin.
        rate: of the moving average of the norms' mean and deviation; 1 takes those of the batch alone.

    The averages live as long as this config (in a patched model: as the patch) and are in no checkpoint.
    """

    margin: float = 0.4
    concentration: float = 0.333
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_margin("margin", self.margin, math.pi / 2)
        check_positive("concentration", self.concentration)
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"rate must be in (0, 1], got {self.rate!r}")

    @cached_property
    def norms(self) -> RunningNorms:
        return RunningNorms(self.rate)


@register(
    "adaface",
    AdaFaceConfig,
    formula="a margin that depends on the norm of h, as a measure of quality",
    statistics=("target", "complement_lse"),
    source="arXiv 2204.00964",
)
def adaface(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: AdaFaceConfig,
) -> Tensor:
    """A margin that grows with the hidden state's norm, one loss a row: (n,).

    `c'_y = cos(theta_y - m z) - (m + m z)`, with `z = clip(h (|hidden| - mean) / (deviation + 1e-3), -1, 1)` of the
    norms clipped to [1e-3, 100]; the angle is kept within [0, pi], and z has no gradient.
    Source: AdaFace (arXiv 2204.00964).
    """

    def rows(bound: Any) -> Tensor:
        hidden = bound.hidden.detach()
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        norm = torch.linalg.vector_norm(hidden, dim=-1).clamp(1e-3, 100.0)
        counted = norm if bound._row_mask is None else norm[bound._row_mask]
        mean, deviation = config.norms.observe(counted)
        quality = (config.concentration * (norm - mean) / (deviation + 1e-3)).clamp(-1.0, 1.0)
        angle = -config.margin * quality

        def with_margin(cosine: Tensor) -> Tensor:
            turned = _turn(cosine, angle)
            turned = torch.where((angle < 0) & (cosine > angle.cos()), torch.ones_like(turned), turned)
            turned = torch.where((angle > 0) & (cosine < -angle.cos()), -torch.ones_like(turned), turned)
            return turned - (config.margin - angle)

        return _margin_rows(bound, config, lambda bound: cosines(bound, labels, config), with_margin)

    return logits.evaluate(rows)


_ELASTIC_MEANS = {"arc": 0.5, "cos": 0.35}


@dataclass(frozen=True)
class ElasticFaceConfig(CosineConfig):
    """Options of the loss `"elasticface"`: those of `CosineConfig`, and

    Args:
        kind: `"arc"` for a margin on the angle as in ArcFace, `"cos"` for one on the cosine as in CosFace.
        margin: mean of the margins drawn; None is 0.5 for `"arc"` and 0.35 for `"cos"`.
        deviation: their standard deviation.
        plus: give the larger margins to the rows whose target's cosine is smaller.
    """

    kind: str = "arc"
    margin: float | None = None
    deviation: float = 0.0125
    plus: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in _ELASTIC_MEANS:
            raise ValueError(f'kind must be "arc" or "cos", got {self.kind!r}')
        _check_margin("margin", self.mean, math.pi if self.kind == "arc" else 2.0)
        if not (self.deviation >= 0 and math.isfinite(self.deviation)):
            raise ValueError(f"deviation must be a number of 0 or more, got {self.deviation!r}")

    @property
    def mean(self) -> float:
        return _ELASTIC_MEANS[self.kind] if self.margin is None else self.margin


@register(
    "elasticface",
    ElasticFaceConfig,
    formula="arcface or cosface with margins drawn from a normal",
    statistics=("target", "complement_lse"),
    source="arXiv 2109.09416",
)
def elasticface(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: ElasticFaceConfig,
) -> Tensor:
    """ArcFace or CosFace with a margin drawn for each row, `m_i ~ N(mean, deviation^2)`, one loss a row: (n,).

    Draws outside [0, pi] are moved to its ends. Source: ElasticFace (arXiv 2109.09416).
    """

    def with_margin(cosine: Tensor) -> Tensor:
        margin = torch.empty_like(cosine).normal_(
            config.mean, config.deviation, generator=config.draws.on(cosine.device)
        )
        margin = margin.clamp(0.0, math.pi)
        if config.plus:
            from_largest = cosine.detach().argsort(descending=True)
            margin = torch.empty_like(margin).scatter_(0, from_largest, margin.sort().values)
        return _add_angle(cosine, margin) if config.kind == "arc" else cosine - margin

    return _margin_rows(logits, config, lambda bound: cosines(bound, labels, config), with_margin)


def _margin_rows(
    logits: Any,
    config: CosineConfig,
    compare: Callable[[Any], Cosines],
    with_margin: Callable[[Tensor], Tensor],
) -> Tensor:
    """`softplus(others_lse - s with_margin(c_y))` a row, of the cosines that `compare` finds: (n,)."""

    def rows(bound: Any) -> Tensor:
        with torch.autocast(bound.device.type, enabled=False):
            found = compare(bound)
            # F.softplus is only its asymptote beyond 20.
            return -F.logsigmoid(config.scale * with_margin(found.target) - found.others_lse)

    return logits.evaluate(rows)


def _turn(cosine: Tensor, angle: Tensor) -> Tensor:
    """`cos(theta + angle)` of `cosine = cos(theta)`; the angle has no gradient."""
    # The slope of the sine is infinite at theta = 0: its square is kept off 0 by less than any other value's rounding.
    sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps ** 2).sqrt()
    return cosine * angle.cos() - sine * angle.sin()


def _add_angle(cosine: Tensor, margin: Tensor) -> Tensor:
    """`cos(theta + margin)`, and `cos(theta) - margin sin(margin)` where theta + margin > pi."""
    return torch.where(cosine >= -margin.cos(), _turn(cosine, margin), cosine - margin * margin.sin())


def _check_margin(name: str, margin: float, largest: float) -> None:
    if not 0.0 <= margin <= largest:
        raise ValueError(f"{name} must be between 0 and {largest:.4g}, got {margin!r}")
