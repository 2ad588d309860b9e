"""Margin softmax losses whose margin differs from row to row: by the hidden state's norm, or drawn."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xhead.losses import register
from xhead.losses.cosines import CosineConfig, Cosines, check_draws, cosines
from xhead.losses.margins import add_angle, check_margin, margin_rows, turn_angle
from xhead.losses.vectors import check_positive


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
    norms: RunningNorms = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin("margin", self.margin, math.pi / 2)
        check_positive("concentration", self.concentration)
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"rate must be in (0, 1], got {self.rate!r}")
        object.__setattr__(self, "norms", RunningNorms(self.rate))


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
            turned = turn_angle(cosine, angle)
            turned = torch.where((angle < 0) & (cosine > angle.cos()), torch.ones_like(turned), turned)
            turned = torch.where((angle > 0) & (cosine < -angle.cos()), -torch.ones_like(turned), turned)
            return turned - (config.margin - angle)

        return margin_rows(bound, config, lambda bound: cosines(bound, labels, config), with_margin)

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
        check_margin("margin", self.mean, math.pi if self.kind == "arc" else 2.0)
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
        return add_angle(cosine, margin) if config.kind == "arc" else cosine - margin

    def compare(bound: Any) -> Cosines:
        check_draws(bound, config)
        return cosines(bound, labels, config)

    return margin_rows(logits, config, compare, with_margin)
