"""Cosines between hidden states and classes, for the margin losses: of all classes or of a random share of them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xhead.factors import Factors
from xhead.lazy import LazyLogits
from xhead.losses.vectors import check_positive, in_row_blocks, unit
from xhead.statistics import check_range


class Draws:
    """The random numbers of one loss: of torch's own generator, or with a seed of one that only this loss uses."""

    def __init__(self, seed: int | None):
        self._seed = seed
        self._generator: torch.Generator | None = None

    def on(self, device: torch.device) -> torch.Generator | None:
        """The generator to draw with on that device; None is torch's own."""
        if self._seed is not None and self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator


@dataclass(frozen=True)
class CosineConfig:
    """Options that all margin losses have.

    Args:
        scale: s, what the cosines are multiplied with.
        class_sample: the share of the classes, in (0, 1], that a call compares with: all target classes of the batch,
            and as many others at random as make up that share. Source: Partial FC (arXiv 2203.15565). The softmax over
            a sample is a biased estimate of that over all classes, and only rows of the sample get a gradient.
        seed: draw from a generator of its own, which lives as long as this config; None draws from torch's.
        engine: see `xhead.LazyLogits.statistics`.
    """

    scale: float = 64.0
    class_sample: float = 1.0
    seed: int | None = None
    engine: str = "auto"
    # Made with the config rather than when first asked for: a compiled graph cannot make it.
    draws: Draws = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        if not 0.0 < self.class_sample <= 1.0:
            raise ValueError(f"class_sample must be a share of the classes in (0, 1], got {self.class_sample!r}")
        object.__setattr__(self, "draws", Draws(self.seed))


class Cosines(NamedTuple):
    """The target's `cos(hidden, weight_y)`, and `log sum_{j != y} exp(scale cos(hidden, weight_j))`, both (n,)."""

    target: Tensor
    others_lse: Tensor


def unit_logits(
    bound: LazyLogits,  # (n, V)
    labels: Tensor,  # (n,)
    config: CosineConfig,
    per_class: int = 1,
) -> tuple[LazyLogits, Tensor]:
    """Logits `scale cos(hidden_i, weight_k)` of the classes to compare with, and the labels as places among them.

    A positive scale of the logits given makes no difference to a cosine and falls away.

    Raises ValueError for logits with a bias, a softcap or a scale that is not positive, and for those of a projection
    with a low-rank adapter on it, whose sum's norms are not at hand.
    """
    canonical, factors = bound._at_hand(), bound._factors()
    if factors.joined:
        raise ValueError(
            "margin losses normalise the rows of the weight, and these logits are a sum of projections (a low-rank "
            'adapter on the output projection); train it whole (PEFT: modules_to_save=["lm_head"]) or leave it frozen'
        )
    if canonical.bias is not None or canonical.softcap is not None or not canonical.scale > 0:
        bias = None if canonical.bias is None else tuple(canonical.bias.shape)
        raise ValueError(
            "margin losses compare directions: they need logits `scale * hidden @ weight.T` with a positive scale, no "
            f"bias and no softcap, got scale={canonical.scale}, a bias of shape {bias} and "
            f"softcap={canonical.softcap}; make the output projection with bias=False and without a softcap"
        )
    rows = factors.out_features
    if rows % per_class:
        raise ValueError(f"sub_centers={per_class} rows a class do not divide the {rows} rows of the weight")
    classes = rows // per_class
    check_range("target", labels, classes)
    if config.class_sample < 1:
        check_draws(bound, config)
        chosen, labels = _sample_classes(labels, classes, config)
        places = torch.arange(per_class, device=chosen.device)
        factors = factors.select((chosen[:, None] * per_class + places).flatten())
    factors = Factors(unit(factors.weight), None, factors.vocabulary)
    logits = LazyLogits.deferred(unit(canonical.hidden), factors, bound._record) * config.scale
    logits._row_mask = bound._row_mask
    return logits, labels


def check_draws(bound: LazyLogits, config: CosineConfig) -> None:
    """Raise ValueError where processes that share the classes would draw numbers of their own."""
    if bound._sharded and config.seed is None:
        raise ValueError(
            "processes that share a vocabulary must draw the same random numbers for their loss: give it a seed, such "
            "as seed=0"
        )


def _sample_classes(labels: Tensor, classes: int, config: CosineConfig) -> tuple[Tensor, Tensor]:
    """Classes in ascending order (m,), those of the labels among them, and the labels as places in that list."""
    priority = torch.rand(classes, generator=config.draws.on(labels.device), device=labels.device)
    priority[labels.flatten()] = 2.0
    wanted = max(round(config.class_sample * classes), int((priority == 2.0).sum()), 1)
    chosen = priority.topk(wanted).indices.sort().values
    return chosen, torch.searchsorted(chosen, labels)


def cosines(bound: LazyLogits, labels: Tensor, config: CosineConfig) -> Cosines:
    """The two numbers a row that a margin on the target needs; shapes as `unit_logits`."""
    logits, labels = unit_logits(bound, labels, config)
    found: Any = logits.statistics(
        "target", "complement_lse", target=labels, columns=labels[..., None], engine=config.engine
    )
    return Cosines(found.target / config.scale, found.complement_lse)


def subcenter_cosines(bound: LazyLogits, labels: Tensor, config: CosineConfig, per_class: int) -> Cosines:
    """As `cosines`, with a class's cosine the largest of those with its `per_class` rows of the weight.

    Row k of class c is row `c per_class + k` of the weight. The gradient goes to the largest alone.
    """
    logits, labels = unit_logits(bound, labels, config, per_class)
    weight = logits.weight

    def block(hidden: Tensor, labels: Tensor) -> Tensor:
        largest = (hidden @ weight.T).unflatten(-1, (-1, per_class)).max(-1).values
        own = labels[:, None]
        others = largest.scatter(1, own, float("-inf"))
        return torch.stack([largest.gather(1, own).squeeze(1), (config.scale * others).logsumexp(-1)], -1)

    found = in_row_blocks(block, (logits.hidden, labels), weight.shape[0])
    return Cosines(found[:, 0], found[:, 1])
