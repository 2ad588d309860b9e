"""The Fourier head in the place of a language model's output projection: for a range of ordered tokens, or for all.

The tokens outside the range keep a dense projection, which has one more class, standing for the whole range. With z the
logit of that class and p the Fourier head's distribution,

    P(token k) = exp(o_k) / (exp(z) + sum_j exp(o_j))              outside the range
    P(token lo + b) = exp(z) / (exp(z) + sum_j exp(o_j)) p_b       inside it
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xhead.heads import register_head
from xhead.heads.base import Head, InnerLinear
from xhead.heads.fourier import FourierHead
from xhead.heads.fourier_bins import FourierBins
from xhead.statistics import check_range, row_statistics


@dataclass(frozen=True)
class FourierConfig:
    """Options of the head `"fourier"`.

    num_frequencies, regularization, scale_free, floor, init_scale, allow_aliasing, low, high: see
        `xhead.heads.FourierHead`; low and high are its bounds.
    token_range: `(first, stop)`: token ids first to stop - 1, in this order, are the bins; None: all are.
    """

    num_frequencies: int
    token_range: tuple[int, int] | None = None
    regularization: float = 0.0
    scale_free: bool = True
    floor: float = 1e-5
    init_scale: float = 0.01
    allow_aliasing: bool = False
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.token_range is None:
            return
        if len(self.token_range) != 2 or not all(isinstance(token, int) for token in self.token_range):
            raise ValueError(f"token_range must be two token ids, (first, stop), got {self.token_range!r}")
        first, stop = self.token_range
        if not 0 <= first < stop:
            raise ValueError(f"token_range is (first, stop) with 0 <= first < stop, got {self.token_range!r}")
        FourierBins(stop - first, self.num_frequencies, allow_aliasing=self.allow_aliasing)
        object.__setattr__(self, "token_range", (first, stop))  # JSON has lists alone


@register_head("fourier", FourierConfig)
class FourierVocabularyHead(Head):
    """A `FourierHead` for the tokens of a range, and a dense projection for the rest and for the choice between both.

    `head.fourier` is the Fourier head, whose `density` is the continuous density given that the token is in the range.
    The dense part starts from the rows of the projection that it replaces; the range's own class starts from the
    mean of the rows in it. The Fourier head starts at random.

    Raises ValueError for a range that goes beyond the vocabulary, and what `FourierHead` raises.
    """

    def __init__(self, in_features: int, out_features: int, config: FourierConfig):
        super().__init__(in_features, out_features)
        first, stop = config.token_range or (0, out_features)
        if stop > out_features:
            raise ValueError(
                f"token_range is {config.token_range}, beyond the vocabulary of {out_features} tokens: "
                f"stop must be at most {out_features}"
            )
        self.first, self.stop = first, stop
        self.fourier = FourierHead(
            in_features,
            stop - first,
            config.num_frequencies,
            regularization=config.regularization,
            scale_free=config.scale_free,
            floor=config.floor,
            init_scale=config.init_scale,
            bounds=(config.low, config.high),
            allow_aliasing=config.allow_aliasing,
        )
        others = out_features - (stop - first)
        # The range's class is the last one.
        self.dense = InnerLinear(in_features, others + 1) if others else None

    @torch.no_grad()
    def start_from(self, projection: nn.Linear) -> None:
        if self.dense is None:
            return
        for mine, theirs in ((self.dense.weight, projection.weight), (self.dense.bias, projection.bias)):
            if theirs is None:
                mine.zero_()
                continue
            mine[: self.first] = theirs[: self.first]
            mine[self.first : -1] = theirs[self.stop :]
            mine[-1] = theirs[self.first : self.stop].mean(0)
        self.dense.bias[-1] += math.log(self.stop - self.first)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., D)
        inside = self.fourier(hidden)
        if self.dense is None:
            return inside.to(hidden.dtype)
        found = self.dense(hidden)
        before, after, gate = found.split([self.first, self.out_features - self.stop, 1], -1)
        return torch.cat((before, (gate + inside).to(hidden.dtype), after), -1)

    def loss_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (n, D), (n,)
        if self.dense is None:
            return self.fourier.loss(hidden, labels)
        check_range("label", labels, self.out_features)
        inside = (labels >= self.first) & (labels < self.stop)
        outer = torch.where(labels < self.first, labels, labels - (self.stop - self.first))
        outer = outer.masked_fill(inside, self.dense.out_features - 1)

        def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            statistics = row_statistics(hidden, weight, ("lse", "target"), bias=bias, target=outer)
            assert statistics.lse is not None and statistics.target is not None
            return statistics.lse - statistics.target

        rows = self.fourier.loss(hidden, (labels - self.first).masked_fill(~inside, -1), ignore_index=-1)
        return self.dense(hidden, consume=cross_entropy) + rows
