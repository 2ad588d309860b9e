"""Sums of losses, `"cce+0.3*ntl_was"`: how they are written, and the lazy logits that their terms share."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xhead.factors import Factors
from xhead.lazy import LazyLogits
from xhead.shared_weight import shared
from xhead.statistics import Statistics

# A plus that does not belong to a factor such as 1e+2.
_PLUS = re.compile(r"(?<!\d[eE])\+")


def parse_sum(text: str) -> list[tuple[float, str]]:
    """(factor, name) of each term of `"name+0.3*name+..."`; a term without a factor has the factor 1.

    Raises ValueError for a term without a name and for a factor that is no finite number.
    """
    terms = []
    for term in _PLUS.split(text):
        factor, star, name = term.rpartition("*")
        try:
            number = float(factor) if star else 1.0
        except ValueError:
            number = math.nan
        if not name.strip() or not math.isfinite(number):
            raise ValueError(
                f"{term.strip()!r} in loss {text!r} is no term of a sum; write the name of a loss, or number*name, "
                'as in "cce+0.3*ntl_was"'
            )
        terms.append((number, name.strip()))
    return terms


@dataclass(frozen=True)
class SumLoss:
    """`sum_t factor_t loss_t(logits, labels)` a row; a term is a `RegisteredLoss` with options of its own."""

    terms: tuple[tuple[float, Any], ...]

    @property
    def name(self) -> str:
        return "+".join(loss.name if factor == 1 else f"{factor:g}*{loss.name}" for factor, loss in self.terms)

    @property
    def ordered(self) -> bool:
        return any(loss.ordered for _, loss in self.terms)

    @property
    def call_options(self) -> frozenset[str]:
        return frozenset(option for _, loss in self.terms for option in loss.call_options)

    def __call__(self, logits: Any, labels: Tensor, **call_options: Any) -> Tensor:
        """Each call option goes to the terms that take it. Raises ValueError where none does."""
        check_call_options(self.name, self.call_options, call_options)
        return logits.evaluate(lambda bound: self._rows(SharedLogits.of(bound), labels, call_options))

    def _rows(self, logits: "SharedLogits", labels: Tensor, call_options: dict[str, Any]) -> Tensor:
        # The gradients are found in the reverse order, and a sparse one for the weight is added in place to a dense one
        # that comes after it, not before: losses that take a few logits alone come last.
        last = [loss.takes_logits for _, loss in self.terms]
        rows: dict[int, Tensor] = {}
        for index in sorted(range(len(self.terms)), key=last.__getitem__):
            factor, loss = self.terms[index]
            own = {name: value for name, value in call_options.items() if name in loss.call_options}
            rows[index] = factor * loss(logits, labels, **own)
        total = rows[0]
        for index in range(1, len(rows)):
            total = total + rows[index]
        return total


def check_call_options(name: Any, known: frozenset[str], given: dict[str, Any]) -> None:
    """Raise ValueError for an argument of the model's cross-entropy that the loss has no meaning for."""
    unknown = [option for option in given if option not in known]
    if unknown:
        raise ValueError(
            f"cross-entropy was called with {', '.join(unknown)}, which the loss {name!r} does not take; call it "
            'without, or patch with loss="cce"'
        )


_OF_OTHER_STATISTICS = ("mean_weight", "values", "columns")


class SharedLogits(LazyLogits):
    """Lazy logits whose lse is computed once for all who ask for it with the same options: one pass, one backward.

    The gradients that the terms have for the weight are summed in place.
    """

    # What is answered of a LazyLogits, also what is registered later.
    _answers = LazyLogits._answers
    _lse_by_options: dict[tuple, Tensor]

    @classmethod
    def of(cls, bound: LazyLogits) -> "SharedLogits":
        """bound: what `LazyLogits.evaluate` gives"""
        logits = object.__new__(cls)
        logits._copy(bound)
        logits._lse_by_options = {}
        factors = bound._factors()
        together = Factors(shared(factors.weight), factors.bias, factors.vocabulary, factors.joined)
        logits._terms = (bound._terms[0]._replace(projection=together),)
        return logits

    def statistics(self, *names: str, target: Tensor | None = None, **options: Any) -> Statistics:
        """As `LazyLogits.statistics`. Where lse is all that is asked for, `row_mask` may be disregarded."""
        if names == ("lse",):
            options.pop("row_mask", None)
        if "lse" not in names or "row_mask" in options:
            return super().statistics(*names, target=target, **options)
        deciding = sorted(name for name in options if name not in _OF_OTHER_STATISTICS)
        key = (torch.is_grad_enabled(), *((name, options[name]) for name in deciding))
        rest = tuple(name for name in names if name != "lse") if key in self._lse_by_options else names
        found = super().statistics(*rest, target=target, **options) if rest else Statistics()
        if "lse" in rest:
            assert found.lse is not None
            self._lse_by_options[key] = found.lse
        return dataclasses.replace(found, lse=self._lse_by_options[key])
