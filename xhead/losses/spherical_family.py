"""The spherical family: losses that see V scores only through their mean, their variance and the targets' scores.

With scores `o` (V,), `mean = 1/V sum_k o_k` and `variance = 1/V sum_k (o_k - mean)^2`, a loss
`l(mean, variance, o_c, y_c : c a target)` has the gradient

    dl/do_k = 2 alpha (o_k - mean) + (dl/dmean)/V + gamma_k [k a target]        alpha = (dl/dvariance)/V

which needs no pass over the classes. In the sums that the papers use, `q = sum_k o_k^2` and `s = sum_k o_k`, these are
`dl/dq = alpha` and `dl/ds = beta = (dl/dmean)/V - 2 alpha mean`. The moments come first here because `q/V - (s/V)^2`
loses its digits in float32 where the scores share a large mean.

A row has K targets, each with a value y (default 1); a target of value 0 is none. All but the squared error are sums of
the losses of single targets, weighted by their values.

Source: Vincent, de Brebisson and Bouthillier, arXiv 1412.7091; de Brebisson and Vincent, arXiv 1511.05042, 1604.08859.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.losses.config import check_number


class Slopes(NamedTuple):
    """Derivatives of each row's loss: by the mean (n,), the variance (n,) and the explicit targets' scores (n, K)."""

    mean: Tensor
    variance: Tensor
    target: Tensor


class SumDerivatives(NamedTuple):
    """A row's loss (n,) and its derivatives by `q` (n,), `s` (n,) and the targets' scores (n, K)."""

    loss: Tensor
    alpha: Tensor
    beta: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class SphericalLoss(ABC):
    """A member of the family. `rows` is differentiable; `slopes` are its first derivatives in closed form.

    is_likelihood: the loss of a single target is -log p of it.
    """

    is_likelihood: ClassVar[bool] = False

    @abstractmethod
    def rows(
        self,
        mean: Tensor,  # (n,)
        variance: Tensor,  # (n,)
        target: Tensor,  # (n, K)
        classes: int,
        values: Tensor | None = None,  # (n, K)
    ) -> Tensor:
        """The loss of each row, (n,)."""

    @abstractmethod
    def slopes(
        self,
        mean: Tensor,  # (n,)
        variance: Tensor,  # (n,)
        target: Tensor,  # (n, K)
        classes: int,
        values: Tensor | None = None,  # (n, K)
    ) -> Slopes:
        """The derivatives of `rows` by the mean, the variance and the targets' scores."""

    def order(self, scores: Tensor) -> Tensor:
        """What classes are ranked by: elementwise, increasing with the probability where there is one."""
        return scores

    def score_scale(self, variance: Tensor) -> Tensor:
        """The factor that brings a row's scores to the scale that the loss sees, (n,)."""
        return torch.ones_like(variance)

    def loss_and_derivatives(
        self,
        q: Tensor,  # (n,) sum_k o_k^2
        s: Tensor,  # (n,) sum_k o_k
        target: Tensor,  # (n, K)
        classes: int,
        values: Tensor | None = None,  # (n, K)
    ) -> SumDerivatives:
        """The loss and its derivatives in the papers' variables."""
        mean = s / classes
        variance = q / classes - mean.square()
        slopes = self.slopes(mean, variance, target, classes, values)
        alpha = slopes.variance / classes
        beta = slopes.mean / classes - 2 * alpha * mean
        return SumDerivatives(self.rows(mean, variance, target, classes, values), alpha, beta, slopes.target)


@dataclass(frozen=True)
class SquaredError(SphericalLoss):
    """`sum_k (o_k - y_k)^2 = V (variance + mean^2) - 2 sum_c y_c o_c + sum_c y_c^2`, with y_k = 0 off the targets."""

    def rows(self, mean, variance, target, classes, values=None) -> Tensor:
        values = torch.ones_like(target) if values is None else values
        return classes * (variance + mean.square()) + (values * (values - 2 * target)).sum(-1)

    def slopes(self, mean, variance, target, classes, values=None) -> Slopes:
        gamma = torch.full_like(target, -2.0) if values is None else -2 * values
        return Slopes(2 * classes * mean, torch.full_like(variance, classes), gamma)


@dataclass(frozen=True)
class ZLoss(SphericalLoss):
    """`sum_c y_c softplus(a (b - z_c)) / a`, z_c = (o_c - mean) / sqrt(variance + eps): the Z-loss, arXiv 1604.08859.

    It depends on standardised scores alone, so neither the scale nor the mean of the scores matters. It is no
    likelihood, and has nothing in common with the penalty on lse^2 that goes by the same name.

    sharpness: a, above 0: how fast a target beyond the margin stops mattering; large ones approach a hinge.
    margin: b, in standard deviations over the classes; z is at most sqrt(V - 1).
    eps: added to the variance, at least 0.
    """

    sharpness: float = 1.0
    margin: float = 0.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        check_number("sharpness", self.sharpness, 0.0, above_least=True)
        check_number("margin", self.margin)
        check_number("eps", self.eps, 0.0)

    def score_scale(self, variance: Tensor) -> Tensor:
        # Rounding can leave the variance of nearly equal scores below 0.
        return (variance.clamp(min=0) + self.eps).rsqrt()

    def _standardised(self, mean: Tensor, variance: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        inverse = self.score_scale(variance)[:, None]
        return (target - mean[:, None]) * inverse, inverse

    def rows(self, mean, variance, target, classes, values=None) -> Tensor:
        z, _ = self._standardised(mean, variance, target)
        loss = F.softplus(self.sharpness * (self.margin - z)) / self.sharpness
        return (loss if values is None else loss * values).sum(-1)

    def slopes(self, mean, variance, target, classes, values=None) -> Slopes:
        z, inverse = self._standardised(mean, variance, target)
        slope = torch.sigmoid(self.sharpness * (self.margin - z)) * inverse
        slope = slope if values is None else slope * values
        return Slopes(slope.sum(-1), (slope * z).sum(-1) * inverse[:, 0] / 2, -slope)


@dataclass(frozen=True)
class LogTaylor(SphericalLoss):
    """`-sum_c y_c log p_c` with `p_k = (1 + o_k + o_k^2/2) / sum_j (1 + o_j + o_j^2/2)`, arXiv 1511.05042.

    The numerator is least at o_k = -1: a target below that is pushed down further, so scores should start near 0.
    """

    is_likelihood = True

    def order(self, scores: Tensor) -> Tensor:
        return (1 + scores).abs()

    def rows(self, mean, variance, target, classes, values=None) -> Tensor:
        # Twice each numerator is 1 + (1 + o)^2: a sum of squares, which does not cancel.
        total = (1 + (1 + mean).square() + variance).log() + math.log(classes)
        loss = total[:, None] - (1 + (1 + target).square()).log()
        return (loss if values is None else loss * values).sum(-1)

    def slopes(self, mean, variance, target, classes, values=None) -> Slopes:
        weight = target.shape[-1] if values is None else values.sum(-1)
        shifted = 1 + mean
        per_variance = weight / (1 + shifted.square() + variance)
        gamma = -2 * (1 + target) / (1 + (1 + target).square())
        return Slopes(2 * shifted * per_variance, per_variance, gamma if values is None else gamma * values)


@dataclass(frozen=True)
class LogSpherical(SphericalLoss):
    """`-sum_c y_c log p_c` with `p_k = (o_k^2 + eps) / sum_j (o_j^2 + eps)`, arXiv 1511.05042.

    It is blind to the score's sign: a class can be told by a large negative score. Near o_c = 0 its gradient turns over
    a width of sqrt(eps).

    eps: above 0.
    """

    eps: float = 1e-2
    is_likelihood = True

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0, above_least=True)

    def order(self, scores: Tensor) -> Tensor:
        return scores.abs()

    def rows(self, mean, variance, target, classes, values=None) -> Tensor:
        total = (variance + mean.square() + self.eps).log() + math.log(classes)
        loss = total[:, None] - (target.square() + self.eps).log()
        return (loss if values is None else loss * values).sum(-1)

    def slopes(self, mean, variance, target, classes, values=None) -> Slopes:
        weight = target.shape[-1] if values is None else values.sum(-1)
        per_variance = weight / (variance + mean.square() + self.eps)
        gamma = -2 * target / (target.square() + self.eps)
        return Slopes(2 * mean * per_variance, per_variance, gamma if values is None else gamma * values)


FAMILY: dict[str, type[SphericalLoss]] = {
    "log_spherical": LogSpherical,
    "log_taylor": LogTaylor,
    "mse": SquaredError,
    "zloss": ZLoss,
}


def spherical_loss(name: str, **options: Any) -> SphericalLoss:
    """The family's member of that name with those options. Raises ValueError for an unknown name, option or value."""
    if name not in FAMILY:
        raise ValueError(f"unknown spherical loss {name!r}; known are {', '.join(FAMILY)}")
    known = [field.name for field in fields(FAMILY[name])]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(unknown)} for spherical loss {name!r}; known are {', '.join(known) or 'none'}"
        )
    return FAMILY[name](**options)
