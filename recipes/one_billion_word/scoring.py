"""What an output head says of given words: their log-probabilities, where it defines any, and their ranks.

Neither builds logits for more than a few rows or classes at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from recipes.one_billion_word.options import ADAPTIVE, SPHERICAL, VQ, ModelOptions
from xhead import LazyLogits
from xhead.heads import SphericalHead
from xhead.heads.vq import VQHead
from xhead.losses.spherical import log_probability
from xhead.losses.spherical_family import FAMILY
from xhead.retrieval import ranks

TOP = (1, 5, 10, 20, 50, 100)
MAX_LOGITS = 1 << 25  # 128 MiB of float32 at a time: 42 rows of the benchmark's vocabulary, 2,500 of the embedded one


class Scorer(Protocol):
    """A head: `defines_probability` says whether `nll` may be asked for."""

    defines_probability: bool

    def nll(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihoods in nats. hidden: (N, D), target: (N,) -> (N,)"""
        ...

    def ranks(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """1 for a target that is the best; among equals it is the last. hidden: (N, D), target: (N,) -> (N,)"""
        ...


class LinearScorer:
    """A linear projection, under the distribution that its loss trains: softmax, Taylor or spherical softmax, or none.

    Args:
        head: the projection.
        loss: the loss's name.
        loss_options: `eps` of the spherical softmax is read from it.
        max_logits: numbers held at a time.
    """

    def __init__(
        self,
        head: nn.Linear,
        loss: str = "stock",
        loss_options: dict | None = None,
        max_logits: int = MAX_LOGITS,
    ) -> None:
        self.head, self.loss, self.max_logits = head, loss, max_logits
        self.options = {name: value for name, value in (loss_options or {}).items() if name == "eps"}
        self.member = FAMILY[loss]() if loss in FAMILY else None
        self.defines_probability = self.member is None or self.member.is_likelihood

    def nll(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if not self.defines_probability:
            raise ValueError(f"the loss {self.loss!r} defines no probability, so there is no likelihood of it")
        if self.member is not None:
            lazy = LazyLogits(hidden, self.head.weight, self.head.bias)
            return -log_probability(lazy, target, self.loss, **self.options)
        rows = max(1, self.max_logits // self.head.out_features)
        parts = zip(hidden.split(rows), target.split(rows), strict=True)
        return torch.cat([F.cross_entropy(self.head(some).float(), ids, reduction="none") for some, ids in parts])

    def ranks(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        order = None if self.member is None else self.member.order
        return ranks(hidden, self.head.weight, target, bias=self.head.bias, order=order)


class AdaptiveScorer:
    """An adaptive softmax (`torch.nn.AdaptiveLogSoftmaxWithLoss`)."""

    defines_probability = True

    def __init__(self, head: nn.AdaptiveLogSoftmaxWithLoss, max_logits: int = MAX_LOGITS) -> None:
        self.head, self.max_logits = head, max_logits

    def nll(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -self.head(hidden, target).output

    def ranks(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return _ranks(self.head.log_prob, hidden, target, max(1, self.max_logits // self.head.n_classes))


class SphericalScorer:
    """A factored spherical head: its own probabilities, where its loss defines any."""

    def __init__(self, head: SphericalHead) -> None:
        self.head, self.defines_probability = head, head.loss.is_likelihood

    def nll(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -self.head.log_probability(hidden, target)

    def ranks(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head.ranks(hidden, target)


class VQScorer:
    """A codebook in the projection's place (`xhead.patch(model, head="vq")`)."""

    defines_probability = True

    def __init__(self, head: VQHead, max_logits: int = MAX_LOGITS) -> None:
        self.head, self.max_logits = head, max_logits

    def nll(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head.loss_rows(hidden, target)

    def ranks(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return _ranks(self.head, hidden, target, max(1, self.max_logits // self.head.out_features))


def _ranks(
    scores_of: Callable[[torch.Tensor], torch.Tensor],  # (n, D) -> (n, V)
    hidden: torch.Tensor,  # (N, D)
    target: torch.Tensor,  # (N,)
    rows: int,
) -> torch.Tensor:
    """`Scorer.ranks`, from the scores of so many rows at a time."""
    found = []
    for some, ids in zip(hidden.split(rows), target.split(rows), strict=True):
        scores = scores_of(some)
        found.append((scores >= scores.gather(1, ids[:, None])).sum(1))
    return torch.cat(found)


def scorer_of(model: PreTrainedModel, options: ModelOptions) -> Scorer:
    """How the head that these options ask for is scored."""
    if options.head == ADAPTIVE:
        return AdaptiveScorer(model.own_head)  # pyright: ignore
    if options.head == SPHERICAL:
        return SphericalScorer(model.own_head)  # pyright: ignore
    if options.head == VQ:
        return VQScorer(model.get_output_embeddings())  # pyright: ignore
    return LinearScorer(output_head(model), options.loss, options.parsed_loss_options)


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The projection from hidden states to logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(f"{type(model).__name__} has {type(head).__name__} as output embeddings; a Linear is needed")
    return head
