"""Functions of a row of logits that are more than one of the statistics: what their passes over tiles share.

Each has a forward of its own, and for the backward the gradient of one tile. The logits of the rows' column sets are
differentiated in the same pass, so that there is one gradient of the weight and not two to be added.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from xhead.engines import chunked, gram
from xhead.engines.gradients import Gradients
from xhead.engines.problem import Problem, cap
from xhead.engines.tiles import Rows, Tiles

_CLASSES = 16384  # converted to the accumulation dtype at a time, for a block of rows with all of its logits


def column_logits(problem: Problem) -> Tensor:
    """The logits of the rows' column sets: (E,)"""
    return gram.forward(problem.having(("column_logits",)), True)[0]["column_logits"]


def tiles_of(problem: Problem) -> Tiles:
    return Tiles(problem, Rows(problem))


def whole_rows(problem: Problem, block_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """All logits of some rows at a time: (rows, (r, V)), at most `block_bytes` of them but at least a row."""
    dtype = problem.accumulate_dtype
    step = max(1, block_bytes // (dtype.itemsize * problem.vocabulary))
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
    column_grad: Tensor,  # (E,) upstream of `column_logits`
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
