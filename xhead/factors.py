"""Where the weight and the bias of lazy logits come from: at hand, or inside the call of a projection."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xhead.standin import Record
from xhead.vocabulary import Vocabulary, own_rows

Operands = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states (..., D), weight (V, D) and bias (V,) or None."""


class Projection(Protocol):
    """Where a weight and a bias come from. The weight is only ever touched inside `consume`."""

    @property
    def out_features(self) -> int: ...

    def consume(self, hidden: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        """`function(hidden, weight, bias)`, run where the weight can be read."""
        ...

    def trains(self) -> bool: ...


class Term(NamedTuple):
    """One projection of a sum of projections: `factor * (hidden @ weight.T + bias)`.

    Where processes share the rows of its weight, hidden comes from `Vocabulary.enter`.
    """

    hidden: Tensor  # (..., D)
    projection: Any
    factor: float


class Factors:
    """A projection whose weight and bias are at hand.

    vocabulary: weight and bias are the rows of this process alone; None where it has all.
    joined: it stands for a sum of projections, `[h1, h2] [W1, W2]'`, whose rows do not have that sum's norms.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, vocabulary: Vocabulary | None = None, joined: bool = False):
        self.weight, self.bias, self.vocabulary, self.joined = weight, bias, vocabulary, joined

    @property
    def out_features(self) -> int:
        return self.weight.shape[0] if self.vocabulary is None else self.vocabulary.classes

    def consume(self, hidden: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        return function(hidden, self.weight, self.bias)

    def trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def to(self, dtype: torch.dtype) -> "Factors":
        bias = None if self.bias is None else self.bias.to(dtype)
        return Factors(self.weight.to(dtype), bias, self.vocabulary, self.joined)

    def whole(self, hidden: Tensor, record: Record) -> Operands:
        """The operands with the rows of all processes, for what each computes alike. hidden: as in `Term`"""
        if self.vocabulary is None:
            return hidden, self.weight, self.bias
        record.warn(
            "gather",
            "what is computed here is no row statistic of one projection: the rows of its weight, which processes "
            f"share, are gathered, {self.out_features} x {self.weight.shape[1]} numbers. Slower and larger, not wrong.",
        )
        bias = None if self.bias is None else self.vocabulary.whole(self.bias)
        return self.vocabulary.leave(hidden), self.vocabulary.whole(self.weight), bias

    def narrow(self, start: int, stop: int) -> "Factors":
        """Of the classes start to stop alone."""
        vocabulary = None
        if self.vocabulary is not None:
            vocabulary = self.vocabulary.narrow(start, stop)
            start = max(start - self.vocabulary.start, 0)
            stop = start + vocabulary.stop - vocabulary.start
        bias = None if self.bias is None else self.bias[start:stop]
        return Factors(self.weight[start:stop], bias, vocabulary, self.joined)

    def select(self, chosen: Tensor) -> "Factors":
        """Of some classes alone, ascending and the same in all processes. chosen: (m,)"""
        vocabulary = None
        if self.vocabulary is not None:
            vocabulary = self.vocabulary.select(chosen)
            chosen = chosen[vocabulary.own] - self.vocabulary.start
        bias = None if self.bias is None else self.bias[chosen]
        return Factors(self.weight.index_select(0, chosen), bias, vocabulary, self.joined)


def at_hand(projection: Any, weight: Tensor, bias: Tensor | None) -> Factors:
    """The weight and bias that a projection has handed over."""
    if isinstance(projection, Factors):
        return Factors(weight, bias, projection.vocabulary, projection.joined)
    return Factors(*own_rows(weight, bias, None))


def join(parts: list[tuple[float, Tensor, Factors]], record: Record) -> tuple[Tensor, Factors]:
    """The sum of `factor * (hidden @ weight.T + bias)` as one projection, `[h1, h2] [W1, W2]'`."""
    dtype = functools.reduce(torch.promote_types, [factors.weight.dtype for _, _, factors in parts])
    whole = [(factor, *factors.whole(hidden, record)) for factor, hidden, factors in parts]
    hidden = torch.cat([(h * factor).to(dtype) for factor, h, _, _ in whole], -1)
    weight = torch.cat([w.to(dtype) for _, _, w, _ in whole], 1)
    biases = [b * factor for factor, _, _, b in whole if b is not None]
    return hidden, Factors(weight, sum(biases[1:], biases[0]) if biases else None, joined=True)
