"""One SGD step on a factored weight: the gradient of n rows of a spherical loss, never formed, its norm and its update.

With scores `o = W h`, a row's gradient by the scores is `delta = 2 alpha (o - mean) + b 1 + sum_c gamma_c e_c`, and the
gradient of W is `Delta' H` (V, D). All that is needed of it are products with itself and with W, which have no V in
their cost: either through Gram matrices of the rows (n, n), or through moments (D, D), whichever is the smaller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from xhead.heads.spherical.factored import FactoredWeight, Products, TargetRows, split
from xhead.losses.spherical_family import Slopes


@dataclass(frozen=True)
class RowGradients:
    """The gradient of W from n rows, in the terms it is made of: about 5 D numbers a row."""

    hidden: Tensor  # (n, D)
    products: Tensor  # (n, width) hidden @ core
    centred: Tensor  # (n, D) Delta (W - 1 mean_row')
    classes: Tensor  # (n, K)
    gamma: Tensor  # (n, K)
    variance: Tensor  # (n,) the loss's derivative by the variance of the scores
    mean: Tensor  # (n,) and by their mean

    @property
    def parts(self) -> Products:
        return split(self.products, self.hidden.shape[1])

    @property
    def total(self) -> Tensor:
        """`Delta 1`, the sum of each row's gradient by the scores, (n,)."""
        return self.mean + self.gamma.sum(1)

    def scaled(self, factor: float) -> RowGradients:
        return RowGradients(
            self.hidden,
            self.products,
            self.centred * factor,
            self.classes,
            self.gamma * factor,
            self.variance * factor,
            self.mean * factor,
        )

    def joined(self, other: RowGradients) -> RowGradients:
        """The rows of both; the narrower set of targets is filled up with weights of 0."""
        width = max(self.classes.shape[1], other.classes.shape[1])
        columns = []
        for field in fields(self):
            pair = [getattr(each, field.name) for each in (self, other)]
            if field.name in ("classes", "gamma"):
                pair = [torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in pair]
            columns.append(torch.cat(pair))
        return RowGradients(*columns)


def row_gradients(
    weight: FactoredWeight,
    hidden: Tensor,  # (n, D)
    products: Tensor,  # (n, width) hidden @ core
    targets: TargetRows,
    slopes: Slopes,
) -> tuple[RowGradients, Tensor]:
    """The gradient of W in its terms, and that of the hidden states, `Delta W` (n, D)."""
    gamma = slopes.target
    centred = targets.weighted(gamma).addr_(gamma.sum(1), weight.mean_row, alpha=-1)
    centred.addcmul_(split(products, weight.size).covariance, slopes.variance[:, None], value=2)
    gradients = RowGradients(hidden, products, centred, targets.classes, gamma, slopes.variance, slopes.mean)
    return gradients, torch.addr(centred, gradients.total, weight.mean_row)


class Step(ABC):
    """A gradient ready to be applied. `norm` is the Frobenius norm of the gradient of W."""

    norm: Tensor

    def __init__(self, weight: FactoredWeight, gradients: RowGradients) -> None:
        self.weight, self.gradients = weight, gradients
        self.alpha2 = 2 * gradients.variance / weight.classes  # (n,) 2 alpha
        self.target_rows, self.positions = self._target_rows()

    @abstractmethod
    def bounds(self, rate: float) -> tuple[float, float]:
        """Bounds of the largest and of minus the least eigenvalue of `rate H' diag(2 alpha) H`, at least 0."""

    def eigenvalues(self, rate: float) -> Tensor:
        """The eigenvalues of `rate H' diag(2 alpha) H`, (D,), in float64: O(n D^2 + D^3)."""
        hidden = self.gradients.hidden.double()
        return torch.linalg.eigvalsh(hidden.T @ (hidden * (rate * self.alpha2.double())[:, None]))

    @abstractmethod
    def apply_to_core(self, rate: float, *, track_inverse: bool) -> Tensor | None:
        """Update C, U, mean_row and omega; with `track_inverse` also U^-1, and return the new `H U^-1` (n, D)."""

    def _target_rows(self) -> tuple[Tensor, Tensor]:
        """`sum gamma_ik h_i` over each class's targets (u, D), and where in it each target (n, K) is."""
        hidden, gamma = self.gradients.hidden, self.gradients.gamma
        found, positions = torch.unique(self.gradients.classes, return_inverse=True)
        rows = hidden.new_zeros(found.shape[0], hidden.shape[1])
        for column in range(gamma.shape[1]):
            rows.index_add_(0, positions[:, column], hidden * gamma[:, column, None])
        return rows, positions

    def _offset_change(self) -> Tensor:
        """`2 alpha (H omega) + b - 2 alpha mean`, (n,)."""
        parts = self.gradients.parts
        return torch.addcmul(self.gradients.mean / self.weight.classes, self.alpha2, parts.offset - parts.mean)


class RowStep(Step):
    """Through (n, n) matrices: n^2 D, for n of up to D rows."""

    def __init__(self, weight: FactoredWeight, gradients: RowGradients) -> None:
        super().__init__(weight, gradients)
        hidden, classes = gradients.hidden, weight.classes
        self.gram = hidden @ hidden.T
        half = torch.addcmul(gradients.centred, gradients.parts.covariance, gradients.variance[:, None], value=-1)
        inner = (hidden @ half.T).mul_(self.alpha2[:, None])
        summed = gradients.gamma.sum(1)
        # Delta Delta' of the centred gradients, without what targets that are the same class add to it.
        self.inner = inner.add_(inner.T.clone()).addr_(summed, summed, alpha=-1 / classes)
        total = gradients.total
        squared = torch.dot(self.inner.reshape(-1), self.gram.reshape(-1)) + self.target_rows.square().sum()
        self.norm = (squared + total @ self.gram @ total / classes).clamp(min=0).sqrt()

    def bounds(self, rate: float) -> tuple[float, float]:
        found = []
        for sign in (rate, -rate):
            scale = (sign * self.alpha2).clamp(min=0)
            trace = float(torch.dot(scale, self.gram.diagonal()))
            found.append(trace if trace < 0.01 else min(trace, float(scale @ self.gram.square() @ scale) ** 0.5))
        return found[0], found[1]

    def apply_to_core(self, rate: float, *, track_inverse: bool) -> Tensor | None:
        weight, gradients = self.weight, self.gradients
        hidden, classes = gradients.hidden, weight.classes
        parts, shrink = gradients.parts, rate * self.alpha2
        change = torch.zeros_like(gradients.products)
        into = split(change, weight.size)
        second = self._times_targets().addmm_(self.inner, hidden)
        torch.add(gradients.centred, second, alpha=-rate / 2, out=into.covariance).mul_(-2 * rate / classes)
        torch.mul(parts.mixed, -shrink[:, None], out=into.mixed)
        rows = None
        if track_inverse:
            solved = torch.linalg.inv(_identity(hidden, len(hidden)).addcmul_(self.gram, shrink, value=-1))
            rows = solved @ parts.inverse
            torch.mul(rows, shrink[:, None], out=into.inverse)
        torch.mul(gradients.total, -rate / classes, out=into.mean)
        torch.mul(self._offset_change(), -rate, out=into.offset)
        weight.core.addmm_(hidden.T, change)
        # The change of the covariance went in doubled and not symmetric.
        weight.covariance.copy_((weight.covariance + weight.covariance.T).mul_(0.5))
        return rows

    def _times_targets(self) -> Tensor:
        """What targets of the same class add to `Delta Delta' H`, (n, D)."""
        gamma = self.gradients.gamma
        result = self.target_rows[self.positions[:, 0]] * gamma[:, :1]
        for column in range(1, gamma.shape[1]):
            result.addcmul_(self.target_rows[self.positions[:, column]], gamma[:, column, None])
        return result


class FeatureStep(Step):
    """Through (D, D) matrices: n D^2, for any number of rows."""

    def __init__(self, weight: FactoredWeight, gradients: RowGradients) -> None:
        super().__init__(weight, gradients)
        hidden, classes = gradients.hidden, weight.classes
        self.second_moment = hidden.T @ (hidden * self.alpha2[:, None])
        self.cross = gradients.centred.T @ hidden
        half = torch.addmm(self.cross, weight.covariance, self.second_moment, alpha=-classes / 2)
        square = self.second_moment @ half
        summed = gradients.gamma.sum(1) @ hidden
        square = (square + square.T).addmm_(self.target_rows.T, self.target_rows)
        self.square = square.addr_(summed, summed, alpha=-1 / classes)
        total = gradients.total @ hidden
        self.norm = (self.square.trace() + total.square().sum() / classes).clamp(min=0).sqrt()

    def bounds(self, rate: float) -> tuple[float, float]:
        lengths = self.gradients.hidden.square().sum(1)
        frobenius = rate * float(self.second_moment.norm())
        found = [float(torch.dot((sign * self.alpha2).clamp(min=0), lengths)) for sign in (rate, -rate)]
        return min(found[0], frobenius), min(found[1], frobenius)

    def apply_to_core(self, rate: float, *, track_inverse: bool) -> Tensor | None:
        weight, hidden, classes = self.weight, self.gradients.hidden, self.weight.classes
        factor = _identity(hidden, weight.size).sub_(self.second_moment, alpha=rate)  # I - rate H' diag(2 alpha) H
        weight.covariance.sub_(self.cross + self.cross.T, alpha=rate / classes).add_(
            self.square, alpha=rate * rate / classes
        )
        weight.mixing.copy_(weight.mixing @ factor)
        weight.mean_row.sub_(self.gradients.total @ hidden, alpha=rate / classes)
        weight.offset.sub_(self._offset_change() @ hidden, alpha=rate)
        if not track_inverse:
            return None
        weight.inverse.copy_(torch.linalg.solve(factor, weight.inverse))
        return hidden @ weight.inverse


def step_of(weight: FactoredWeight, gradients: RowGradients) -> Step:
    """The step, in the form that costs less for this number of rows."""
    return (RowStep if gradients.hidden.shape[0] <= weight.size else FeatureStep)(weight, gradients)


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
