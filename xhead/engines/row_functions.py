"""Functions of a row of logits that are more than one of the statistics: what their passes over tiles share.

Each has a forward of its own, and for the backward the gradient of one tile. The logits of the rows' column sets are
differentiated in the same pass, so that there is one gradient of the weight and not two to be added.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xhead.engines import chunked, gram
from xhead.engines.gradients import Gradients
from xhead.engines.problem import Problem, cap
from xhead.engines.tiles import Rows, Tiles

_CLASSES = 16384  # converted to the accumulation dtype at a time, for a block of rows with all of its logits


@dataclass(frozen=True)
class Processes:
    """Who holds the classes: the problem has those of one process, and this is what it knows of all."""

    offsets: Tensor  # (N + 1,) of the rows' column sets in compressed-row form, with all classes
    held: Tensor  # (m,) the places, among the E entries of these sets, of those that the problem has
    classes: int  # V
    most: int  # classes that a process has at most
    rank: int = 0
    gather: Callable[[Tensor], Tensor] = lambda found: found[None]  # (...) -> (R, ...), the same in all processes

    @classmethod
    def alone(cls, offsets: Tensor, classes: int) -> "Processes":
        """One that holds all classes. offsets: (N + 1,)"""
        return cls(offsets, torch.arange(int(offsets[-1]), device=offsets.device), classes, classes)

    def sum(self, found: Tensor) -> Tensor:
        """(...) -> (...)"""
        return self.gather(found).sum(0)

    def column_logits(self, problem: Problem) -> Tensor:
        """The logits of the rows' column sets: (E,)"""
        own = gram.forward(problem.having(("column_logits",)), True)[0]["column_logits"]
        return self.sum(own.new_zeros(int(self.offsets[-1])).index_copy(0, self.held, own))


def tiles_of(problem: Problem) -> Tiles:
    return Tiles(problem, Rows(problem))


def whole_rows(problem: Problem, block_bytes: int, most: int) -> Iterator[tuple[slice, Tensor]]:
    """All logits of some rows at a time: (rows, (r, V)), at most `block_bytes` of them but at least a row.

    most: the largest V of all processes, so that all of them take the same rows at a time
    """
    dtype = problem.accumulate_dtype
    step = max(1, block_bytes // (dtype.itemsize * most))
    for first in range(0, problem.rows, step):
        rows = slice(first, min(first + step, problem.rows))
        hidden = problem.hidden[rows].to(dtype)
        logits = hidden.new_empty(hidden.shape[0], problem.vocabulary)
        for start in range(0, problem.vocabulary, _CLASSES):
            classes = slice(start, start + _CLASSES)
            torch.mm(hidden, problem.weight[classes].to(dtype).T, out=logits[:, classes])
        if problem.bias is not None:
            logits += problem.bias.to(dtype)
        yield rows, cap(logits.mul_(problem.scale), problem.softcap)


def gradients(
    tiles: Tiles,
    residuals: chunked.Residuals,
    column_grad: Tensor,  # (m,) upstream of the logits of the problem's own entries
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias: every tile again, multiplied out."""
    problem = tiles.problem
    entries = problem.having(("column_logits",))
    closed_form = gram.ClosedFormGradient(entries, gram.empty_state(entries, True), {"column_logits": column_grad})
    found = Gradients.for_rows(problem, problem.rows, needs)
    chunked.add_exact(found, tiles, residuals, closed_form, streaming=True)
    if found.hidden is not None:
        closed_form.add_hidden_grad(found.hidden)
    inputs = (problem.hidden, problem.weight, problem.bias)
    return tuple(  # type: ignore[return-value]
        None if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in zip(found, inputs, strict=True)
    )


def times_cap_slope(residual: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """The gradient for the capped logits made that for the raw ones, in place. residual, logits: (n, c)"""
    return residual if softcap is None else residual.addcmul_(residual, (logits / softcap).square_(), value=-1)
