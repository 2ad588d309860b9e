"""What a trained spherical head answers: scores, the best classes, ranks and probabilities, without N x V numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from xhead.heads.spherical.factored import FactoredWeight, split
from xhead.losses.spherical_family import SphericalLoss
from xhead.retrieval import TopK, fit_inverse_temperature
from xhead.statistics import check_range, row_statistics

Method = TypeVar("Method", bound=Callable[..., Any])


def _exactly(method: Method) -> Method:
    """Without gradients, and in the head's own dtype."""

    @functools.wraps(method)
    def exact(self: Prediction, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return method(self, hidden, *arguments, **named)

    return cast(Method, exact)


class Prediction(nn.Module):
    """The part of a head that needs its weight and its loss, and changes neither."""

    weight: FactoredWeight
    loss: SphericalLoss
    inverse_temperature: Tensor

    def _features(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden` as features (n, D), and `features @ core`."""
        features = self._features(hidden)
        return features, features @ self.weight.core

    @_exactly
    def scores(self, hidden: Tensor, classes: Tensor) -> Tensor:
        """Scores of the given classes in O(D^2 + K D) a row. hidden: (..., D), classes: (..., K) -> (..., K)"""
        with self.weight.together():
            features, products = self._projected(hidden)
            _check_lead("classes", classes.shape[:-1], hidden)
            check_range("class", classes, self.weight.classes)
        rows = self.weight.target_rows(classes.reshape(len(features), classes.shape[-1]))
        return rows.scores(features, products).reshape(classes.shape)

    @_exactly
    def topk(self, hidden: Tensor, k: int, *, block: int = 8192) -> TopK:
        """The k best classes and their scores, (..., k), exact: by score, for the losses that are likelihoods by p_k.

        hidden: (..., D). Of equal scores, which comes first is not specified. Raises as `xhead.retrieval.topk`.
        """
        with self.weight.together():
            features = self._features(hidden)
        found = self.weight.topk(features, k, self.loss.order, block)
        shape = (*hidden.shape[:-1], k)
        return TopK(found.scores.reshape(shape), found.classes.reshape(shape))

    @_exactly
    def ranks(self, hidden: Tensor, labels: Tensor, *, ties: str = "worst", block: int = 8192) -> Tensor:
        """Each label's place among all classes, 1 the best. hidden: (..., D), labels: (...) -> (...)

        Ties and errors as in `xhead.retrieval.ranks`.
        """
        with self.weight.together():
            features = self._features(hidden)
        found = self.weight.ranks(features, labels.reshape(-1), self.loss.order, ties, block)
        return found.reshape(labels.shape)

    def _comparable(self, hidden: Tensor) -> Tensor:
        """Rows u with `u . f_k` the scores on the scale that the loss sees, up to a constant a row, (n, D)."""
        features, products = self._projected(hidden)
        parts = split(products, self.weight.size)
        variance = torch.linalg.vecdot(parts.covariance, features).clamp(min=0)
        return parts.mixed * self.loss.score_scale(variance)[:, None]

    @_exactly
    def fit_temperature(self, hidden: Tensor, labels: Tensor) -> float:
        """Fit the temperature T of `softmax(z / T)` on held-out rows; probabilities are available after it.

        z are the scores, for the Z-loss the standardised ones. hidden: (..., D), labels: (...). Needs about 15 passes
        over N x V D. Kept in the state dict.

        Raises ValueError for a loss whose scores are probabilities already, or where no temperature fits.
        """
        if self.loss.is_likelihood:
            raise ValueError(f"{type(self.loss).__name__} has probabilities of its own: there is no temperature to fit")
        if self.weight.place.processes > 1:
            raise RuntimeError(
                "fit_temperature needs all classes in one process: call it on "
                "SphericalHead.from_linear(head.to_linear())"
            )
        factor = fit_inverse_temperature(self._comparable(hidden), self.weight.factor, labels.reshape(-1))
        self.inverse_temperature.fill_(factor)
        return 1 / factor

    @_exactly
    def log_probability(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p of each label in nats. hidden: (..., D), labels: (...) -> (...)

        In O(D^2) a row for `log_taylor` and `log_spherical`; for the others of `fit_temperature`'s softmax, O(V D).

        Raises RuntimeError for `zloss` and `mse` before `fit_temperature`: their scores are no log-probabilities.
        """
        with self.weight.together():
            features, products = self._projected(hidden)
            _check_lead("labels", labels.shape, hidden)
            check_range("label", labels, self.weight.classes)
        flat = labels.reshape(-1)
        if self.loss.is_likelihood:
            parts = split(products, self.weight.size)
            variance = torch.linalg.vecdot(parts.covariance, features).clamp(min=0)
            target = self.weight.target_rows(flat[:, None]).scores(features, products)
            return -self.loss.rows(parts.mean, variance, target, self.weight.classes).reshape(labels.shape)
        if self.inverse_temperature.isnan():
            raise RuntimeError(
                f"the scores of {type(self.loss).__name__} are no log-probabilities: call "
                "fit_temperature(hidden, labels) on held-out rows first"
            )
        scaled = self._comparable(hidden) * self.inverse_temperature.to(hidden.device, self.weight.core.dtype)
        found = row_statistics(scaled, self.weight.factor, ("lse", "target"), target=flat)
        assert found.lse is not None and found.target is not None
        return (found.target - found.lse).reshape(labels.shape)

    def perplexity(self, hidden: Tensor, labels: Tensor) -> float:
        """`exp` of the mean of -log p over the labels; raises as `log_probability`."""
        return float((-self.log_probability(hidden, labels)).mean().exp())


def _check_lead(name: str, found: torch.Size, hidden: Tensor) -> None:
    if found != hidden.shape[:-1]:
        raise RuntimeError(f"{name} must have the rows of hidden, {tuple(hidden.shape[:-1])}, got {tuple(found)}")
