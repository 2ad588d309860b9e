"""Functions of whole rows of lazy logits, made differentiable."""

from typing import Any, Protocol

import torch
from torch import Tensor

from xhead.engines.problem import Problem
from xhead.statistics import compressed_columns


class RowFunction(Protocol):
    """A function of the rows of a problem, with its gradients."""

    def forward(self, problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(the results, what the backward needs)"""
        ...

    def backward(
        self,
        problem: Problem,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias. grads: upstream of the results"""
        ...


def apply(
    function: RowFunction,
    logits: Any,  # LazyLogits (n, V)
    columns: Tensor,  # (n, K), -1 for none, or sparse CSR (n, V)
) -> tuple[Tensor, ...]:
    """The results of the function, of `cap(scale * (hidden @ weight.T + bias))` and the rows' sets of columns.

    Raises RuntimeError for logits of another form.
    """

    def compute(bound: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias = bound.hidden, bound.weight, bound.bias
        offsets, column = compressed_columns(columns, hidden.shape[:-1], weight.shape[0])
        problem = Problem(
            hidden=hidden.detach(),
            weight=weight.detach(),
            names=("column_logits",),
            bias=None if bias is None else bias.detach(),
            row_offsets=offsets,
            columns=column,
            scale=bound.scale,
            softcap=bound.softcap,
        )
        return _applied(hidden, weight, bias, problem, function)  # type: ignore[call-arg]

    return logits.evaluate(compute)


@torch.compiler.disable
def _applied(*arguments: Any) -> tuple[Tensor, ...]:
    # Their passes go by the sizes of the rows' sets: the graph breaks here, rather than being traced through them.
    return _Apply.apply(*arguments)  # type: ignore[return-value]


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, problem, function):
        with _without_autocast(hidden):
            results, saved = function.forward(problem)
        ctx.problem, ctx.function = problem, function
        # The inputs too, so that a change of them between forward and backward is noticed.
        ctx.save_for_backward(hidden, weight, bias, *saved)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        hidden, _, _, *saved = ctx.saved_tensors
        with _without_autocast(hidden):
            gradients = ctx.function.backward(ctx.problem, tuple(saved), grads, ctx.needs_input_grad[:3])
        return *gradients, None, None


def _without_autocast(hidden: Tensor) -> torch.autocast:
    # The operands carry the dtype they were cast to when the head was called; sums must stay float32.
    return torch.autocast(hidden.device.type, enabled=False)
