"""Statistics tile by tile with PyTorch's own GEMMs: any device, made for the CPU.

Forward: each block of rows meets each block of classes once, in a buffer that stays in cache. Backward: the exact
gradient forms each tile again and multiplies it out; where it is filtered, `skipping` does better on most tiles.
"""

import torch
from torch import Tensor

from xhead.engines import gram, skipping
from xhead.engines.problem import Problem, Results
from xhead.engines.replaying import Replayer
from xhead.engines.residual import Gradients, Residual
from xhead.engines.tiles import Rows, Running, Tiles


def eligible(problem: Problem) -> bool:
    return True


def _split(problem: Problem) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that are streamed, and those left to the closed forms.

    A target that is one class a row is streamed with the others: next to its own softmax entry the two gradients cancel
    exactly, which they would not when rounded apart.
    """
    closed = tuple(name for name in problem.closed_names if name != "target")
    streamed = tuple(name for name in problem.names if name not in closed)
    return streamed, closed


def _class_order(problem: Problem, save: bool, rows: Rows) -> Tensor | None:
    """The filter wants similar classes side by side; without it the order of the weight's rows is the fastest."""
    return skipping.mean_logit_order(problem, rows) if skipping.wanted(problem, save) else None


def empty_state(problem: Problem, save: bool) -> list[Tensor]:
    """Two per-row statistics that the gradient needs, the moments of the closed forms, and what the filter left out."""
    streamed, closed = _split(problem)
    found = [torch.empty(problem.rows, dtype=problem.accumulate_dtype, device=problem.hidden.device) for _ in _STATE]
    return [
        *found,
        *gram.empty_state(problem.having(closed), save),
        *skipping.empty_state(problem.having(streamed), save),
    ]


_STATE = ("lse", "uniform_mean")


def forward(problem: Problem, save: bool) -> tuple[Results, list[Tensor]]:
    streamed, closed = _split(problem)
    results, moments = gram.forward(problem.having(closed), save)
    streaming = problem.having(streamed)
    rows = Rows(streaming)
    tiles = Tiles(streaming, rows, _class_order(streaming, save, rows))
    state = skipping.empty_state(streaming, save)
    recorder = skipping.Recorder(tiles, skipping.SkippingState(*state)) if state else None
    found: dict[str, list[Tensor]] = {}
    for first, last in tiles.row_blocks():
        hidden, running = rows.hidden(first, last), Running(tiles, first, last)
        for start, stop in tiles.class_blocks():
            logits = tiles.logits(hidden, tiles.weight(start, stop), start)
            exponentials = tiles.scratch(logits)
            rescale = running.update(logits, exponentials, start)
            if recorder is not None:
                recorder.record(logits, exponentials, running, rescale, start)
        block = running.results()
        if tiles.order is not None:
            block["argmax"] = tiles.order[block["argmax"]].long()
        if recorder is not None and not recorder.finish_rows(running, block["lse"]):
            recorder = None
            tiles.take_in_order(None)
        for name, value in block.items():
            found.setdefault(name, []).append(value)
    whole = {name: rows.spread(torch.cat(pieces)) for name, pieces in found.items()}
    if not whole:
        whole = _nothing(streaming)
    results.update({name: whole[name] for name in streamed})
    # Outputs of one operator must not share memory, so what is both a result and a state is copied.
    kept = [whole[name].clone() if name in whole else whole["lse"].new_empty(problem.rows) for name in _STATE]
    return results, [*kept, *moments, *state]


def _nothing(problem: Problem) -> Results:
    """The statistics where no row counts."""
    zeros = torch.zeros(problem.rows, dtype=problem.accumulate_dtype, device=problem.hidden.device)
    results = {name: zeros.clone() for name in (*problem.names, "lse")}
    if "argmax" in results:
        results["argmax"] = results["argmax"].long()
    if problem.values is not None:
        results["expectation"] = zeros.new_zeros(problem.rows, problem.values.shape[1])
    return results


def backward(
    problem: Problem, results: Results, state: list[Tensor], grads: Results, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    streamed, closed = _split(problem)
    known = dict(zip(_STATE, state[:2], strict=True)) | results
    moments, skipped = state[2:5], skipping.restore(state[5:])
    streaming = problem.having(streamed)
    rows = Rows(streaming)
    tiles = Tiles(streaming, rows, None if skipped is None else skipped.order)
    found = {name: rows.take(value) for name, value in known.items()}
    row_grads = {name: rows.take(grad) for name, grad in grads.items() if name in streamed}
    residual = Residual(tiles, found, row_grads)
    closed_grads = {name: grad for name, grad in grads.items() if name in closed}
    closed_form = gram.ClosedFormGradient(problem.having(closed), moments, closed_grads, tiles.order)
    needs_hidden, needs_weight, needs_bias = needs
    size, dtype, device = problem.weight.shape[1], problem.accumulate_dtype, problem.hidden.device
    hidden_grad = torch.zeros(rows.count, size, dtype=dtype, device=device) if needs_hidden else None
    weight_grad = torch.empty_like(problem.weight) if needs_weight else None
    bias_grad = torch.zeros(problem.vocabulary, dtype=dtype, device=device) if needs_bias else None
    replayer = None if skipped is None else Replayer(tiles, residual, skipped)

    for start, stop in tiles.class_blocks() if row_grads or needs_weight or needs_bias else ():
        weight, classes = tiles.weight(start, stop), tiles.classes(start, stop)
        if replayer is not None:
            replayer.begin_classes(weight, start)
        weight_tile = None if weight_grad is None else torch.zeros(weight.shape, dtype=dtype, device=device)
        bias_tile = None if bias_grad is None else torch.zeros(stop - start, dtype=dtype, device=device)
        for first, last in tiles.row_blocks() if row_grads else ():
            hidden = rows.hidden(first, last)
            wanted = Gradients(
                None if hidden_grad is None else hidden_grad[first:last], weight_tile, bias_tile, problem.scale
            )
            exact = wanted if replayer is None else replayer.add(wanted, hidden, weight, first, last, start)
            if exact is not None:
                logits = tiles.logits(hidden, weight, start)
                exact.add(residual.tile(logits, first, last, start), hidden, weight)
        if weight_grad is not None and weight_tile is not None:
            closed_form.add_weight_grad(weight_tile, start, stop)
            weight_grad[classes] = weight_tile.to(weight_grad.dtype)
        del weight, weight_tile  # before the next are made
        if bias_grad is not None and bias_tile is not None:
            closed_form.add_bias_grad(bias_tile, start, stop)
            bias_grad[classes] = bias_tile
    if replayer is not None:
        tiles.release()
        replayer.finish_weight(weight_grad, bias_grad)
    if hidden_grad is not None:
        if replayer is not None:
            replayer.finish_hidden(hidden_grad)
        hidden_grad = rows.spread(hidden_grad)
        closed_form.add_hidden_grad(hidden_grad)
        hidden_grad = hidden_grad.to(problem.hidden.dtype)
    if bias_grad is not None and problem.bias is not None:
        bias_grad = bias_grad.to(problem.bias.dtype)
    return hidden_grad, weight_grad, bias_grad
