"""Statistics by Triton kernels: a fused pass forward that also leaves what each tile holds, and two ways back.

The forward of `lse`, `max`, `argmax` and the target writes, for each row and tile of classes, the tile's largest logit
and its log-sum-exp, in 16 bits together. Once the final log-sum-exp is known, that tells which tiles (a block of rows
by a block of classes) hold an entry of at least the threshold. Where they are few, the backward visits no others
(`active_tiles`); where they are many, where nothing is filtered, and for all other statistics, it goes through all
classes a slice at a time (`slices`).
"""

import importlib.util

import torch
from torch import Tensor

from xhead.engines import class_order, gram
from xhead.engines.active_tiles import ActiveTiles
from xhead.engines.operands import Operands, blocks_for, kernels
from xhead.engines.problem import Problem, Results
from xhead.engines.row_sums import RowSums
from xhead.engines.slices import Slices
from xhead.engines.tile_means import Record

DENSE_SHARE = 0.5
"""The share of active tiles above which every tile is multiplied out.

To be set by `benchmarks.gpu`. By arithmetic, a share f costs 6 f N V D operations in kernels that are expected to run
at three quarters of the speed of torch's GEMMs, and about 3 V D^2 for what is skipped; the dense path costs 6 N V D.
"""

FUSED_FORWARD = True
"""Whether the fused kernel also serves where it has no record to leave: no gradient, or an exact one.

To be decided by `benchmarks.gpu`. The slices move 8 bytes an entry of the logits, a sixth of the time of the GEMM at
D 2,304 on an H100; torch's GEMM has to beat the kernel's by as much.
"""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_VALUES = 16  # columns of `values`, which a program goes through one after the other
_FUSED = {"lse", "max", "argmax", "target"}


def eligible(problem: Problem) -> bool:
    """On NVIDIA's (Ampere or newer) and AMD's GPUs where triton is installed; anywhere in triton's interpreter."""
    device = problem.hidden.device
    return (
        _available(device)
        and problem.hidden.dtype in _DTYPES
        and problem.transform is None
        and problem.hidden.shape[1] > 0
        and (problem.values is None or problem.values.shape[1] <= _MOST_VALUES)
    )


@torch.compiler.assume_constant_result
def _available(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and knobs.runtime.interpret


def _fused(problem: Problem, save: bool) -> bool:
    """Whether the forward is the fused kernel's."""
    return (
        _FUSED.issuperset(problem.streamed_names)
        and not problem.soft_target
        and (FUSED_FORWARD or _recorded(problem, save))
    )


def _recorded(problem: Problem, save: bool) -> bool:
    """Whether the forward leaves what each tile holds."""
    names, options = problem.streamed_names, problem.filter
    return save and options.threshold > 0.0 and "lse" in names and _FUSED.issuperset(names) and not problem.soft_target


def empty_state(problem: Problem, save: bool) -> list[Tensor]:
    """The rows' log-sum-exp and mean logit, the closed forms' moments, the record of the tiles and what it needs."""
    device, rows, recorded = problem.hidden.device, problem.rows, _recorded(problem, save)
    across = -(-problem.vocabulary // blocks_for(problem).classes) if recorded else 0
    return [
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        *gram.empty_state(problem.having(problem.other_names), save),
        torch.empty(across, rows, dtype=torch.int16, device=device),
        torch.empty(rows if recorded else 0, dtype=torch.float32, device=device),
        torch.empty(problem.vocabulary if recorded else 0, dtype=torch.int32, device=device),
    ]


def forward(problem: Problem, save: bool) -> tuple[Results, list[Tensor]]:
    results, moments = gram.forward(problem.having(problem.other_names), save)
    streaming = problem.having(problem.streamed_names)
    lse, uniform_mean, *_, codes, reference, order = empty_state(problem, save)
    operands = Operands(streaming)
    found: Results = {}
    if operands.rows.count == 0:
        found = _nothing(streaming)
    elif _fused(problem, save):
        record = None
        if codes.numel():
            order.copy_(class_order.current(problem.vocabulary, order.device))
            record = _record(codes, reference, order, operands.rows.count)
            record.reference.copy_(_reference(operands, order))
        found = _fused_statistics(streaming, operands, record)
    else:
        found = Slices(streaming, operands).statistics()
    if operands.rows.count and "target" in streaming.names and operands.target is not None:
        row = torch.arange(problem.rows, device=lse.device)
        found["target"] = gram.gathered_logits(problem, operands.rows.take(row), operands.target)
    whole = {name: operands.rows.spread(value) for name, value in found.items()}
    results.update({name: whole[name] for name in streaming.names})
    # Outputs of one operator must not share memory, so what is both a result and a state is copied.
    lse.copy_(whole["lse"])
    uniform_mean.copy_(whole.get("uniform_mean", lse))
    return results, [lse, uniform_mean, *moments, codes, reference, order]


def _record(codes: Tensor, reference: Tensor, order: Tensor, count: int) -> Record:
    """The record of the rows that count. codes: (class blocks, N), reference: (N,)"""
    across = codes.shape[0]
    return Record(codes.view(-1)[: across * count].view(across, count), reference[:count], order)


def _reference(operands: Operands, order: Tensor) -> Tensor:
    """Log-sum-exp over as many classes as a tile has, the likeliest and others, so at most that over all: (n,)."""
    half = operands.blocks.classes // 2
    step = max(order.shape[0] // half, 1)
    some = torch.cat([order[:half], order[half::step]])
    bias = None if operands.bias is None else operands.bias[some]
    return kernels("row_statistics").row_statistics(
        operands.source, operands.weight[some], bias, None, operands.blocks, argmax=False,
        row_index=operands.row_index, **operands.options,
    )[0]  # fmt: skip


def _fused_statistics(problem: Problem, operands: Operands, record: Record | None) -> Results:
    # Where nothing is held for a backward there is room for a copy of the rows, which descriptors can load.
    lse, largest, argmax = kernels("row_statistics").row_statistics(
        operands.hidden if record is None else operands.source,
        operands.weight,
        operands.bias,
        None if record is None else record.order,
        operands.blocks,
        argmax="argmax" in problem.names,
        record=None if record is None else record.codes,
        reference=None if record is None else record.reference,
        row_index=None if record is None else operands.row_index,
        **operands.options,
    )
    if record is not None:
        class_order.learn(operands, lse)
    return {"lse": lse, "max": largest} | ({} if argmax is None else {"argmax": argmax})


def _nothing(problem: Problem) -> Results:
    """The statistics where no row counts."""
    zeros = torch.zeros(0, dtype=torch.float32, device=problem.hidden.device)
    found = {name: zeros.clone() for name in (*problem.names, "lse")}
    if "argmax" in found:
        found["argmax"] = zeros.long()
    if problem.values is not None:
        found["expectation"] = zeros.new_zeros(0, problem.values.shape[1])
    return found


def backward(
    problem: Problem, results: Results, state: list[Tensor], grads: Results, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    lse, uniform_mean, *moments, codes, reference, order = state
    closed_grads = {name: grad for name, grad in grads.items() if name in problem.other_names}
    closed_form = gram.ClosedFormGradient(problem.having(problem.other_names), moments, closed_grads)
    streaming = problem.having(problem.streamed_names)
    operands = Operands(streaming)
    rows, device = operands.rows, problem.hidden.device
    bias_grad = torch.zeros(problem.vocabulary, device=device) if needs[2] else None
    upstream = {name: rows.take(grad) for name, grad in grads.items() if name in streaming.names}
    streamed = bool(upstream) and rows.count > 0
    tiles, found = None, {}
    if streamed:
        known = results | {"lse": lse, "uniform_mean": uniform_mean}
        # Those of the closed forms are not needed, nor are they all one number a row.
        found = {name: rows.take(value) for name, value in known.items() if name not in problem.other_names}
        if codes.numel() and _filtered(problem, upstream, needs):
            tiles = ActiveTiles(streaming, operands, _record(codes, reference, order, rows.count), found["lse"])
            tiles = tiles if tiles.share <= DENSE_SHARE else None
    weight_grad = None
    if needs[1]:
        make = torch.empty_like if streamed else torch.zeros_like  # either way back writes every class
        weight_grad = make(problem.weight, memory_format=torch.contiguous_format)
    hidden_grad = None
    if tiles is not None:
        sums = RowSums(problem.hidden) if needs[0] else None
        tiles.add_gradients(upstream, found.get("target"), sums, closed_form, weight_grad, bias_grad)
        hidden_grad = None if sums is None else sums.result
    else:
        if needs[0]:
            hidden_grad = torch.zeros(rows.count, problem.hidden.shape[1], device=device)
        if streamed:
            Slices(streaming, operands).add_gradients(found, upstream, hidden_grad, weight_grad, bias_grad)
        if hidden_grad is not None:
            hidden_grad = rows.spread(hidden_grad)
            closed_form.add_hidden_grad(hidden_grad)
            hidden_grad = hidden_grad.to(problem.hidden.dtype)
    _add_closed_form(problem, closed_form, weight_grad, bias_grad)
    if bias_grad is not None and problem.bias is not None:
        bias_grad = bias_grad.to(problem.bias.dtype)
    return hidden_grad, weight_grad, bias_grad


def _filtered(problem: Problem, upstream: Results, needs: tuple[bool, bool, bool]) -> bool:
    options = problem.filter
    return "lse" in upstream and (options.hidden_grad or not needs[0]) and (options.weight_grad or not needs[1])


def _add_closed_form(
    problem: Problem, closed_form: gram.ClosedFormGradient, weight_grad: Tensor | None, bias_grad: Tensor | None
) -> None:
    if not closed_form.any():
        return
    for start, stop in gram.blocks(problem.vocabulary):
        if weight_grad is not None:
            tile = weight_grad[start:stop].float()
            closed_form.add_weight_grad(tile, start, stop)
            weight_grad[start:stop] = tile
        if bias_grad is not None:
            closed_form.add_bias_grad(bias_grad[start:stop], start, stop)
