"""The statistics as PyTorch operators: `torch.library` ops with fake and autograd registrations.

torch.compile traces one as a single node; the engine runs inside. A second derivative goes through the reference
engine.
"""

import torch
from torch import Tensor

from xhead import engines
from xhead.engines import deferral, gram, reference
from xhead.engines.problem import FilterOptions, Problem, Results

_NOT_DIFFERENTIABLE = ("max", "argmax")


def statistics(problem: Problem, engine: str) -> Results:
    """The statistics `problem.names`, differentiable, computed by the engine named (or `"auto"`)."""
    engine = engines.select(engine, problem)
    if engine == "reference":
        return reference.statistics(problem)
    differentiable = (problem.hidden, problem.weight, problem.bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    outputs = _forward_op(*_pack(problem), engine, needs_grad)
    return dict(zip(problem.names, outputs, strict=False))


def _pack(problem: Problem) -> tuple:
    return (
        problem.hidden,
        problem.weight,
        problem.bias,
        problem.target,
        problem.values,
        problem.row_offsets,
        problem.columns,
        problem.mean_weight,
        problem.row_mask,
        ",".join(problem.names),
        _join(problem.pointwise, *problem.pointwise_parameters),
        problem.scale,
        problem.softcap,
        problem.filter.threshold,
        problem.filter.compensate,
        problem.filter.hidden_grad,
        problem.filter.weight_grad,
    )


def _join(name: str | None, *parameters: float) -> str | None:
    return None if name is None else ",".join([name, *map(repr, parameters)])


def _unpack(*arguments) -> Problem:
    *tensors, names, pointwise, scale, softcap, threshold, compensate, hidden_grad, weight_grad = arguments
    hidden, weight, bias, target, values, row_offsets, columns, mean_weight, row_mask = tensors
    function, *parameters = (None,) if pointwise is None else pointwise.split(",")
    return Problem(
        hidden=hidden,
        weight=weight,
        names=tuple(names.split(",")),
        bias=bias,
        target=target,
        values=values,
        row_offsets=row_offsets,
        columns=columns,
        mean_weight=mean_weight,
        row_mask=row_mask,
        pointwise=function,
        pointwise_parameters=tuple(map(float, parameters)),
        scale=scale,
        softcap=softcap,
        filter=FilterOptions(threshold, compensate, hidden_grad, weight_grad),
    )


_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? values, Tensor? row_offsets, "
    "Tensor? columns, Tensor? mean_weight, Tensor? row_mask, str names, str? pointwise, float scale, float? softcap, "
    "float threshold, bool compensate, bool hidden_grad, bool weight_grad"
)
"""What `_pack` gives, as the operators' schemas name it."""


@torch.library.custom_op(
    "xhead::row_statistics", mutates_args=(), schema=f"({_PROBLEM}, str engine, bool save) -> Tensor[]"
)
def _forward_op(*arguments) -> list[Tensor]:
    *packed, engine, save = arguments
    problem = _unpack(*packed)
    # The caller has cast for autocast already; inside, float32 accumulation must stay float32.
    with torch.autocast(problem.hidden.device.type, enabled=False):
        results, state = engines.get(engine).forward(problem, save)
    return [results[name] for name in problem.names] + list(state)


@_forward_op.register_fake
def _(*arguments):
    *problem_arguments, engine, save = arguments
    problem = _unpack(*problem_arguments)
    outputs = []
    for name in problem.names:
        dtype = torch.int64 if name == "argmax" else problem.accumulate_dtype
        shape: tuple[int, ...] = (problem.rows,)
        if name == "expectation" and problem.values is not None:
            shape = (problem.rows, problem.values.shape[1])
        elif name == "column_logits" and problem.columns is not None:
            shape = tuple(problem.columns.shape)
        outputs.append(problem.hidden.new_empty(shape, dtype=dtype))
    return outputs + list(engines.get(engine).empty_state(problem, save))


@torch.library.custom_op(
    "xhead::row_statistics_backward",
    mutates_args=(),
    schema=f"({_PROBLEM}, str engine, Tensor[] outputs, str grad_names, Tensor[] grads, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]",
)
def _backward_op(*arguments) -> list[Tensor]:
    *packed, engine, outputs, grad_names, grads, needs_hidden, needs_weight, needs_bias = arguments
    problem = _unpack(*packed)
    results = dict(zip(problem.names, outputs, strict=False))
    state = outputs[len(problem.names) :]
    row_grads = dict(zip(grad_names.split(","), grads, strict=True))
    needs = (needs_hidden, needs_weight, needs_bias)
    with torch.autocast(problem.hidden.device.type, enabled=False):
        gradients = engines.get(engine).backward(problem, results, state, row_grads, needs)
    # An operator's outputs are tensors: one that is not needed comes back empty.
    return [problem.hidden.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward_op.register_fake
def _(hidden, weight, bias, *arguments):
    needs = arguments[-3:]
    inputs = (hidden, weight, bias)
    return [torch.empty_like(t) if need else hidden.new_empty(0) for t, need in zip(inputs, needs, strict=True)]


def _setup_context(ctx, inputs, output):
    *problem_arguments, engine, _ = inputs
    tensors, options = problem_arguments[:9], problem_arguments[9:]
    names = options[0].split(",")
    ctx.save_for_backward(*tensors, *output)
    ctx.options, ctx.engine, ctx.names = options, engine, names
    ctx.mark_non_differentiable(
        *(o for i, o in enumerate(output) if i >= len(names) or names[i] in _NOT_DIFFERENTIABLE)
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, output_grads):
    saved = ctx.saved_tensors  # to be read once: activation checkpointing refuses a second time
    tensors, outputs = saved[:9], saved[9:]
    needs = ctx.needs_input_grad[:3]
    grads = {name: grad for name, grad in zip(ctx.names, output_grads, strict=False) if grad is not None}
    problem = _unpack(*tensors, *ctx.options)
    if not grads or not any(needs):
        gradients = [None, None, None]
    elif torch.is_grad_enabled():
        gradients = _differentiable_backward(problem, grads, needs)
    elif ctx.engine == "gram" and (pending := deferral.find(problem)) is not None:
        state = list(outputs[len(ctx.names) :])
        with torch.autocast(problem.hidden.device.type, enabled=False):
            gradients = gram.backward(problem, {}, state, grads, needs, take_weight=pending.add)
    else:
        gradients = _backward_op(
            *tensors, *ctx.options, ctx.engine, list(outputs), ",".join(grads), list(grads.values()), *needs
        )
    none = [None] * (len(ctx.needs_input_grad) - len(needs))
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *none


def _differentiable_backward(problem: Problem, grads: Results, needs) -> list[Tensor | None]:
    """The gradients as functions of the inputs, for a derivative of a derivative."""
    inputs = (problem.hidden, problem.weight, problem.bias)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    results = reference.statistics(problem.having(tuple(grads)))
    upstream = list(grads.values())
    found = iter(torch.autograd.grad([results[name] for name in grads], wanted, upstream, create_graph=True))
    return [next(found) if need else None for need in needs]


_forward_op.register_autograd(_backward, setup_context=_setup_context)
