"""Functions of whole rows of lazy logits, made differentiable."""

from typing import Any, Protocol

import torch
from torch import Tensor

from xhead.engines.problem import Problem
from xhead.engines.row_functions import Processes
from xhead.sharded import check_batch, of_own_classes
from xhead.statistics import compressed_columns


class RowFunction(Protocol):
    """A function of the rows of a problem, with its gradients."""

    def forward(self, problem: Problem, processes: Processes) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(the results, what the backward needs)"""
        ...

    def backward(
        self,
        problem: Problem,
        processes: Processes,
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

    Processes that share the classes all get them, and each the gradients of its own. Raises RuntimeError for logits of
    another form.
    """

    def compute(bound: Any) -> tuple[Tensor, ...]:
        canonical, factors = bound._at_hand(), bound._factors()
        hidden, weight, bias, vocabulary = canonical.hidden, factors.weight, canonical.bias, factors.vocabulary
        offsets, column = compressed_columns(columns, hidden.shape[:-1], bound.shape[-1])
        problem = Problem(
            hidden=hidden.detach(),
            weight=weight.detach(),
            names=("column_logits",),
            bias=None if bias is None else bias.detach(),
            row_offsets=offsets,
            columns=column,
            scale=canonical.scale,
            softcap=canonical.softcap,
        )
        processes = Processes.alone(offsets, weight.shape[0])
        if vocabulary is not None:
            vocabulary.agree(hidden, weight, bias, f"{function}; scale={canonical.scale}, softcap={canonical.softcap}")
            check_batch(vocabulary, hidden.device, hidden.shape[0], column)
            processes = Processes(
                offsets,
                vocabulary.holds(column).nonzero().squeeze(1),
                vocabulary.classes,
                max(stop - start for start, stop in vocabulary.ranges),
                vocabulary.rank,
                lambda found: vocabulary.gather(found.flatten()).view(vocabulary.size, *found.shape),
            )
            problem = of_own_classes(problem, vocabulary)
        return _applied(hidden, weight, bias, problem, processes, function)  # type: ignore[call-arg]

    return logits.evaluate(compute)


@torch.compiler.disable
def _applied(*arguments: Any) -> tuple[Tensor, ...]:
    # Their passes go by the sizes of the rows' sets: the graph breaks here, rather than being traced through them.
    return _Apply.apply(*arguments)  # type: ignore[return-value]


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, problem, processes, function):
        with _without_autocast(hidden):
            results, saved = function.forward(problem, processes)
        ctx.problem, ctx.processes, ctx.function = problem, processes, function
        # The inputs too, so that a change of them between forward and backward is noticed.
        ctx.save_for_backward(hidden, weight, bias, *saved)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        hidden, _, _, *saved = ctx.saved_tensors
        with _without_autocast(hidden):
            gradients = ctx.function.backward(ctx.problem, ctx.processes, tuple(saved), grads, ctx.needs_input_grad[:3])
        return *gradients, None, None, None


def _without_autocast(hidden: Tensor) -> torch.autocast:
    # The operands carry the dtype they were cast to when the head was called; sums must stay float32.
    return torch.autocast(hidden.device.type, enabled=False)
