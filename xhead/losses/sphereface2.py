"""SphereFace2: a binary classifier for each class on the cosines, in place of a softmax over them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.engines.summands import SUMMANDS, adjusted_cosine
from xhead.losses import register
from xhead.losses.config import check_number
from xhead.losses.cosines import CosineConfig, unit_logits
from xhead.losses.margins import check_margin


@dataclass(frozen=True)
class SphereFace2Config(CosineConfig):
    """Options of the loss `"sphereface2"`: those of `CosineConfig`, and

    Args:
        margin: m, in units of the adjusted cosine g.
        power: t, at least 1: how far g draws the large cosines apart.
        balance: a, in (0, 1), the share of the right class in the loss.
        factor: f, of the whole.
        offset: b. It is a number, not learned; None makes right and wrong classes pull alike where all cosines are 0.
    """

    scale: float = 40.0
    margin: float = 0.4
    power: float = 3.0
    balance: float = 0.7
    factor: float = 50.0
    offset: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin("margin", self.margin, 2.0)
        check_number("power", self.power, 1.0)
        check_number("factor", self.factor, 0.0, above_least=True)
        if not 0.0 < self.balance < 1.0:
            raise ValueError(f"balance must be a share in (0, 1), both left out, got {self.balance!r}")
        if self.offset is not None:
            check_number("offset", self.offset)

    def offset_for(self, classes: int) -> float:
        """b; where it is not given, the solution of `a sigmoid(-(y + b)) = (1 - a) (V - 1) sigmoid(n + b)`, with y and
        n what a right and a wrong class have at cosine 0."""
        if self.offset is not None:
            return self.offset
        odds = self.balance / ((1 - self.balance) * max(classes - 1, 1))
        wrong = self.scale * (2 * 0.5**self.power - 1 + self.margin)
        root = math.sqrt((1 - odds) ** 2 + 4 * odds * math.exp(-2 * self.scale * self.margin))
        return math.log(2 * odds) - wrong - math.log(1 - odds + root)


@register(
    "sphereface2",
    SphereFace2Config,
    formula="a binary loss for each class, of g(cos) = 2 ((cos + 1) / 2)^t - 1 with a margin",
    statistics=("pointwise_sum", "target"),
    source="arXiv 2108.01513",
)
def sphereface2(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: SphereFace2Config,
) -> Tensor:
    """Binary losses of the adjusted cosines `g_j = 2 ((cos_j + 1) / 2)^t - 1`, summed over the classes: (n,).

    `f/s [ a softplus(-(s (g_y - m) + b)) + (1 - a) sum_{j != y} softplus(s (g_j + m) + b) ]`, with s the scale. g is
    differentiated as it stands. Source: SphereFace2 (arXiv 2108.01513), with the additive margin on the cosine.
    """

    def rows(bound: Any) -> Tensor:
        with torch.autocast(bound.device.type, enabled=False):
            scaled, places = unit_logits(bound, labels, config)
            offset = config.offset_for(scaled.shape[-1])
            parameters = (config.scale, config.power, config.scale * config.margin + offset)
            found: Any = scaled.statistics(
                "pointwise_sum",
                "target",
                target=places,
                pointwise="adjusted_cosine",
                pointwise_parameters=parameters,
                engine=config.engine,
            )
            wrong = found.pointwise_sum - SUMMANDS["adjusted_cosine"].value(found.target, *parameters)
            right = adjusted_cosine(found.target, config.scale, config.power) - config.scale * config.margin + offset
            pulls = config.balance * -F.logsigmoid(right) + (1 - config.balance) * wrong
            return config.factor / config.scale * pulls

    return logits.evaluate(rows)
