"""Statistics tile by tile with PyTorch's own GEMMs: any device, made for the CPU.

Forward: each block of rows meets each block of classes once, in a buffer that stays in cache. Backward: the exact
gradient forms each tile again and multiplies it out; where it is filtered, `skipping` does better on most tiles.
"""

from typing import Protocol

import torch
from torch import Tensor

from xhead.engines import gram, skipping
from xhead.engines.gradients import Gradients
from xhead.engines.problem import Problem, Results
from xhead.engines.replaying import Replayer
from xhead.engines.residual import Residual
from xhead.engines.tiles import Rows, Running, Tiles


def eligible(problem: Problem) -> bool:
    return True


def _split(problem: Problem) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that tiles give, and those left to the closed forms: none where tiles alone cost less."""
    if gram.eligible(problem) and not gram.cheaper(problem):
        closed = tuple(name for name in problem.names if name in ("subset_lse", "column_logits"))
        return tuple(name for name in problem.names if name not in closed), closed
    return problem.streamed_names, problem.other_names


def empty_state(problem: Problem, save: bool) -> list[Tensor]:
    """Two per-row statistics that the gradient needs, the moments of the closed forms, and what the filter left out."""
    streamed, closed = _split(problem)
    return [
        *_per_row(problem),
        *gram.empty_state(problem.having(closed), save),
        *skipping.empty_state(problem.having(streamed), save),
    ]


_STATE = ("lse", "uniform_mean")


def _per_row(problem: Problem) -> list[Tensor]:
    return [torch.empty(problem.rows, dtype=problem.accumulate_dtype, device=problem.hidden.device) for _ in _STATE]


def forward(problem: Problem, save: bool) -> tuple[Results, list[Tensor]]:
    streamed, closed = _split(problem)
    results, moments = gram.forward(problem.having(closed), save)
    streaming = problem.having(streamed)
    rows = Rows(streaming)
    # The filter wants similar classes side by side; without it the order of the weight's rows is the fastest.
    order = skipping.class_order(streaming, rows) if skipping.wanted(streaming, save) else None
    tiles = Tiles(streaming, rows, order)
    state = skipping.empty_state(streaming, save)
    recorder = None if order is None else skipping.Recorder(tiles, skipping.SkippingState(*state))
    found: dict[str, list[Tensor]] = {}
    for first, last in tiles.row_blocks():
        hidden, running = rows.hidden(first, last), Running(tiles, first, last)
        for start, stop in tiles.class_blocks():
            weight = tiles.weight(start, stop)
            logits = tiles.logits(hidden, weight, start)
            exponentials = tiles.scratch(logits) if running.softmax else None
            running.update(logits, exponentials, start)
            if recorder is not None and exponentials is not None:
                recorder.record(logits, exponentials, weight, running, start)
        block = running.results()
        if tiles.order is not None:
            block["argmax"] = tiles.order[block["argmax"]].long()
        if recorder is not None:
            recorder.finish_rows(running, block["lse"])
        for name, value in block.items():
            found.setdefault(name, []).append(value)
    if recorder is None:
        skipping.stand_aside(state)
    else:
        recorder.finish()
    whole = {name: rows.spread(torch.cat(pieces)) for name, pieces in found.items()}
    if not whole:
        whole = _nothing(streaming)
    results.update({name: whole[name] for name in streamed})
    # Outputs of one operator must not share memory, so what is both a result and a state is copied.
    kept = _per_row(problem)
    for name, tensor in zip(_STATE, kept, strict=True):
        if name in whole:
            tensor.copy_(whole[name])
    return results, [*kept, *moments, *state]


def _nothing(problem: Problem) -> Results:
    """The statistics where no row counts."""
    zeros = torch.zeros(problem.rows, dtype=problem.accumulate_dtype, device=problem.hidden.device)
    results = {name: zeros.clone() for name in problem.names}
    if "argmax" in results:
        results["argmax"] = results["argmax"].long()
    if problem.values is not None:
        results["expectation"] = zeros.new_zeros(problem.rows, problem.values.shape[1])
    return results


def backward(
    problem: Problem, results: Results, state: list[Tensor], grads: Results, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    streamed, closed = _split(problem)
    known = dict(zip(_STATE, state[:2], strict=True)) | {name: results[name] for name in streamed}
    moments, skipped = state[2:5], skipping.restore(state[5:])
    streaming = problem.having(streamed)
    rows = Rows(streaming)
    tiles = Tiles(streaming, rows, None if skipped is None else skipped.order)
    found = {name: rows.take(value) for name, value in known.items()}
    row_grads = {name: rows.take(grad) for name, grad in grads.items() if name in streamed}
    residual = Residual(tiles, found, row_grads)
    closed_grads = {name: grad for name, grad in grads.items() if name in closed}
    closed_form = gram.ClosedFormGradient(problem.having(closed), moments, closed_grads)

    gradients = Gradients.for_rows(problem, rows.count, needs)
    if skipped is not None and row_grads:
        Replayer(tiles, residual, skipped, gradients).run(closed_form)
    elif row_grads or gradients.weight is not None or gradients.bias is not None:
        add_exact(gradients, tiles, residual, closed_form, streaming=bool(row_grads))
    hidden_grad, weight_grad, bias_grad = gradients
    if hidden_grad is not None:
        hidden_grad = rows.spread(hidden_grad)
        closed_form.add_hidden_grad(hidden_grad)
        hidden_grad = hidden_grad.to(problem.hidden.dtype)
    if bias_grad is not None and problem.bias is not None:
        bias_grad = bias_grad.to(problem.bias.dtype)
    return hidden_grad, weight_grad, bias_grad


class Residuals(Protocol):
    """Where `d loss / d logits` of a tile comes from."""

    def tile(self, logits: Tensor, first: int, last: int, start: int) -> Tensor:
        """(n, c), `scale` apart. logits: (n, c), rows first to last, classes from `start` on."""
        ...


def add_exact(
    gradients: Gradients,
    tiles: Tiles,
    residual: Residuals,
    closed_form: gram.ClosedFormGradient,
    *,
    streaming: bool,
) -> None:
    """Every tile again, multiplied out. streaming: whether any gradient comes from the tiles at all."""
    for start, stop in tiles.class_blocks():
        weight = tiles.weight(start, stop)
        part = gradients.of_classes(start, stop, weight.dtype)
        first_rows = True
        for first, last in tiles.row_blocks() if streaming else ():
            hidden = tiles.rows.hidden(first, last)
            logits = tiles.logits(hidden, weight, start)
            tile = residual.tile(logits, first, last, start)
            part.of_rows(first, last).add(tile, hidden, weight, tiles.problem.scale, fresh=first_rows)
            first_rows = False
        if first_rows:
            part.clear_classes()
        if part.weight is not None:
            closed_form.add_weight_grad(part.weight, start, stop)
        if part.bias is not None:
            closed_form.add_bias_grad(part.bias, start, stop)
        gradients.put_classes(part, slice(start, stop))
