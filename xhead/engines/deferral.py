"""The weight's gradient of the closed forms, once for many calls.

Each call's part is `(W~ - mbar) R + 1 r' + rows`: a matrix, a vector, and the rows of the classes that were gathered.
All three add up over calls with one weight, so that the product, the V D^2 of a backward, is left for the end.
They add up over processes too, which exchange them in place of the gradient: D^2 numbers and D a class that was
gathered, where the gradient has V D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xhead.engines.gram import ClosedFormGradient
from xhead.engines.problem import Problem
from xhead.engines.weight_moments import blocks, extended_rows

if TYPE_CHECKING:
    from xhead.exchange import Exchange

_pending: list[Pending] = []
"""The weights whose gradients are put off. Shared by all threads: autograd has threads of its own on GPUs."""


def put_off(weight: Tensor) -> bool:
    """Whether the gradient of this very tensor is put off."""
    return any(each.weight is weight for each in _pending)


def find(problem: Problem) -> Pending | None:
    """What collects this problem's gradient of its weight, if anything does."""
    return next((each for each in _pending if each.takes(problem)), None)


class Pending:
    """The gradient of one weight, collected from `start` until `finish` or `abandon`.

    exchange: processes that have the same weight; the gradient is the mean of theirs.
    """

    def __init__(self, weight: Tensor, exchange: Exchange | None = None):
        self.weight, self.exchange = weight, exchange  # (V, D)
        self._versions: tuple[int, ...] = (weight._version,)
        self._problem: Problem | None = None  # without rows: the weight and the bias that all calls share

    def start(self) -> None:
        _pending.append(self)

    def abandon(self) -> None:
        """Collect no more, and forget what was collected."""
        _pending[:] = [each for each in _pending if each is not self]

    def takes(self, problem: Problem) -> bool:
        """Calls with another bias than the first one's, or with weighted means, keep their own gradient."""
        if problem.weight is not self.weight or problem.mean_weight is not None:
            return False
        return self._problem is None or self._problem.bias is problem.bias

    def add(self, terms: ClosedFormGradient) -> None:
        """Collect one call's part. Raises RuntimeError if weight or bias has changed since the first."""
        problem, size = terms.problem, self.weight.shape[1]
        if self._problem is None:
            self._problem = Problem(problem.hidden.new_empty(0, size), self.weight, ("variance",), problem.bias)
            self._versions += () if problem.bias is None else (problem.bias._version,)
            options = {"dtype": problem.accumulate_dtype, "device": self.weight.device}
            self._centre = torch.zeros(size + 1, **options)
            self._matrix = torch.zeros(size + 1, size, **options)
            self._vector = torch.zeros(size, **options)
            self._rows = torch.zeros(self.weight.shape, **options)
            self._touched = torch.zeros(len(self.weight), dtype=torch.bool, device=self.weight.device)
        self._check_unchanged()
        if terms.mean_grad is not None:
            self._vector += problem.scale / problem.vocabulary * terms.mean_moment[:-1]
        if terms.variance_grad is not None:
            self._centre = terms.centre
            self._matrix += 2 * problem.scale**2 / problem.vocabulary * terms.variance_moment[:, :-1]
        if terms.entries is not None:
            row, column, value = terms.entries
            self._touched[column] = True
            for start, stop in blocks(row.shape[0]):
                hidden = problem.hidden[row[start:stop]].to(self._rows.dtype)
                self._rows.index_add_(0, column[start:stop], hidden * value[start:stop, None])

    @torch.no_grad()
    def finish(self) -> None:
        """Collect no more, and add what was collected to `weight.grad`.

        Raises RuntimeError as `add` does; between processes also where one of them collected nothing, or has a gradient
        from elsewhere: on all of them.
        """
        self.abandon()
        if self.exchange is not None:
            with self.exchange.together():
                self._check_reducible()
                self._check_unchanged()
            self._reduce(self.exchange)
        elif self._problem is not None:
            self._check_unchanged()
        if self._problem is None:
            return
        for start, stop in blocks(self.weight.shape[0]):
            centred = extended_rows(self._problem, slice(start, stop)).sub_(self._centre)
            self._rows[start:stop].addmm_(centred, self._matrix).add_(self._vector)
        gradient = self._rows.to(self.weight.dtype)
        if self.weight.grad is None:
            self.weight.grad = gradient
        else:
            self.weight.grad += gradient

    def _check_reducible(self) -> None:
        if self._problem is None:
            raise RuntimeError("no gradient was collected in this process, which has to take part: give it a batch too")
        if self.weight.grad is not None:
            raise RuntimeError(
                "the projection's weight has a gradient from elsewhere, which would not be reduced between the "
                "processes: untie it from the embedding, and call zero_grad() before the block"
            )

    def _reduce(self, exchange: Exchange) -> None:
        """What was collected, averaged over the processes."""
        exchange.agree(shape=tuple(self.weight.shape), dtype=self._rows.dtype)
        for sums in (self._matrix, self._vector):
            exchange.add_up(sums).div_(exchange.size)
        classes = self._touched.nonzero()[:, 0]
        counts = exchange.share(len(classes))
        rows = exchange.gather(self._rows[classes], counts).div_(exchange.size)
        self._rows[classes] = 0.0
        self._rows.index_add_(0, exchange.gather(classes, counts), rows)

    def _check_unchanged(self) -> None:
        bias = None if self._problem is None else self._problem.bias
        if self._versions != tuple(each._version for each in (self.weight, bias) if each is not None):
            raise RuntimeError(
                "the output projection was changed while its gradient was being accumulated; leave "
                "`with xhead.accumulate(...)` before optimizer.step()"
            )
