"""Margin softmax losses: cross-entropy of scaled cosines, where the target's has to win by a margin.

With `c_j = cos(hidden, weight_j)` and `c'_y` what the margin makes of the target's cosine, a row's loss is

    -log( exp(s c'_y) / (exp(s c'_y) + sum_{j != y} exp(s c_j)) ) = softplus( log sum_{j != y} exp(s c_j) - s c'_y )

so that it takes two numbers a row, and the gradient is exact, the margin's derivative included.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.losses import register
from xhead.losses.cosines import CosineConfig, Cosines, cosines, subcenter_cosines, unit_logits
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
        check_margin("margin", self.margin, 2.0)


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
    return margin_rows(logits, config, lambda bound: cosines(bound, labels, config), lambda c: c - config.margin)


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
        check_margin("margin", self.margin, math.pi)

    def with_margin(self, cosine: Tensor) -> Tensor:
        moved = add_angle(cosine, cosine.new_tensor(self.margin))
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
    return margin_rows(logits, config, lambda bound: cosines(bound, labels, config), config.with_margin)


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
    return margin_rows(
        logits, config, lambda bound: subcenter_cosines(bound, labels, config, per_class), config.with_margin
    )


def margin_rows(
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


def turn_angle(cosine: Tensor, angle: Tensor) -> Tensor:
    """`cos(theta + angle)` of `cosine = cos(theta)`; the angle has no gradient."""
    # The slope of the sine is infinite at theta = 0: its square is kept off 0 by less than any other value's rounding.
    sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps ** 2).sqrt()
    return cosine * angle.cos() - sine * angle.sin()


def add_angle(cosine: Tensor, margin: Tensor) -> Tensor:
    """`cos(theta + margin)`, and `cos(theta) - margin sin(margin)` where theta + margin > pi."""
    return torch.where(cosine >= -margin.cos(), turn_angle(cosine, margin), cosine - margin * margin.sin())


def check_margin(name: str, margin: float, largest: float) -> None:
    if not 0.0 <= margin <= largest:
        raise ValueError(f"{name} must be between 0 and {largest:.4g}, got {margin!r}")
