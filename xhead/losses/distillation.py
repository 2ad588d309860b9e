"""Distillation of a student from a teacher: divergences between two softmaxes over one vocabulary, neither built.

P is the teacher's distribution, Q the student's, both at one temperature. Tiles of both logits are formed, forward and
again backward; the gradient is exact and goes to the student alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xhead.engines.problem import cap
from xhead.engines.tiles import tile_shape
from xhead.lazy import LazyLogits
from xhead.losses.config import check_lazy
from xhead.losses.vectors import check_positive
from xhead.statistics import row_statistics


def forward_kl(
    student: LazyLogits,  # (..., V)
    teacher: LazyLogits,  # (..., V)
    *,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # (...) bool
) -> Tensor:
    """`KL(P || Q) = sum_k P_k log(P_k / Q_k)` a row, in nats: the classic distillation loss, without a factor T^2.

    Args:
        student, teacher: logits of one shape; hidden sizes, weights, biases, softcaps and dtypes may differ.
        temperature: T; the distributions are softmax(logits / T).
        row_mask: rows that are False are left out of all work: 0, without a gradient.

    Returns:
        (...), float32, or float64 for a float64 student. Not differentiable twice.

    Raises:
        RuntimeError: shapes that do not fit together. ValueError: a temperature that is not a positive number.
    """
    return _divergence(_forward_kl, student, teacher, temperature, row_mask)


def reverse_kl(
    student: LazyLogits,  # (..., V)
    teacher: LazyLogits,  # (..., V)
    *,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # (...) bool
) -> Tensor:
    """`KL(Q || P) = sum_k Q_k log(Q_k / P_k)` a row, in nats; arguments and errors as `forward_kl`."""
    return _divergence(_reverse_kl, student, teacher, temperature, row_mask)


def generalised_jsd(
    student: LazyLogits,  # (..., V)
    teacher: LazyLogits,  # (..., V)
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # (...) bool
) -> Tensor:
    """`beta KL(P || M) + (1 - beta) KL(Q || M)` a row, in nats, with `M = beta P + (1 - beta) Q`.

    beta lies in (0, 1); divided by beta the limit at 0 is `forward_kl`, and by 1 - beta that at 1 is `reverse_kl`.
    Other arguments and errors as `forward_kl`.

    Source: generalised knowledge distillation (arXiv 2306.13649).
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie in (0, 1), got {beta!r}; use forward_kl or reverse_kl for the ends")
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()

    def jsd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
        slope = (1 - beta) * log_q.exp() * (log_q - log_m)
        return beta * log_p.exp() * (log_p - log_m) + slope, slope

    return _divergence(jsd, student, teacher, temperature, row_mask)


Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log P, log Q) of a tile -> the terms whose sum over the classes is the divergence, and slopes `a_k = Q_k dD/dQ_k`.

The gradient for the student's logits o is then `dD/do_k = a_k - Q_k sum_j a_j`, whatever is added to all dD/dQ_k.
"""


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return p * (log_p - log_q), -p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    terms = log_q.exp() * (log_q - log_p)
    return terms, terms


class _Operands(NamedTuple):
    """Logits `cap(scale * (hidden @ weight.T + bias))`, the temperature in scale and softcap."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, bound: LazyLogits, temperature: float, rows: Tensor | None) -> "_Operands":
        hidden = bound.hidden.reshape(-1, bound.hidden.shape[-1])
        softcap = None if bound.softcap is None else bound.softcap / temperature
        return cls(
            hidden if rows is None else hidden[rows], bound.weight, bound.bias, bound.scale / temperature, softcap
        )

    def detached(self) -> "_Operands":
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def lse(self) -> Tensor:
        """(n,)"""
        found: Any = row_statistics(
            self.hidden, self.weight, ("lse",), bias=self.bias, scale=self.scale, softcap=self.softcap
        )
        return found.lse

    def tile(self, rows: slice, classes: slice, dtype: torch.dtype) -> Tensor:
        """Logits of those rows and classes."""
        logits = self.hidden[rows].to(dtype) @ self.weight[classes].to(dtype).T
        if self.bias is not None:
            logits += self.bias[classes].to(dtype)
        return cap(logits.mul_(self.scale), self.softcap)


def _divergence(
    terms: Terms, student: LazyLogits, teacher: LazyLogits, temperature: float, row_mask: Tensor | None
) -> Tensor:
    check_positive("temperature", temperature)
    for logits in (student, teacher):
        check_lazy(logits)
    if student.shape != teacher.shape:
        raise RuntimeError(
            f"student and teacher must have one shape (..., V), got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "slice the larger vocabulary's logits"
        )
    shape = student.shape[:-1]
    if row_mask is not None and (row_mask.shape != shape or row_mask.dtype != torch.bool):
        raise RuntimeError(
            f"row_mask must be torch.bool of shape {tuple(shape)}, got {row_mask.dtype} of {tuple(row_mask.shape)}"
        )
    rows = None if row_mask is None else row_mask.flatten().nonzero().squeeze(1)

    def with_student(bound: LazyLogits) -> Tensor:
        ours = _Operands.of(bound, temperature, rows)

        def with_teacher(bound: LazyLogits) -> Tensor:
            theirs = _Operands.of(bound, temperature, rows).detached()
            found: Any = _Divergence.apply(ours.hidden, ours.weight, ours.bias, ours[3:], theirs, terms)
            return found

        return teacher.evaluate(with_teacher)

    found = student.evaluate(with_student)
    if rows is not None:
        found = found.new_zeros(shape.numel()).index_copy(0, rows, found)
    return found.reshape(shape)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, options, teacher: _Operands, terms: Terms) -> Tensor:
        student = _Operands(hidden, weight, bias, *options)
        with torch.autocast(hidden.device.type, enabled=False):
            lses = student.lse(), teacher.lse()
            value, slope = torch.zeros_like(lses[0]), torch.zeros_like(lses[0])
            for rows in _blocks(hidden, 0):
                for classes in _blocks(weight, 1):
                    _, log_q, log_p = _log_probabilities(student, teacher, lses, rows, classes)
                    tile, slopes = terms(log_p, log_q)
                    value[rows] += tile.sum(-1)
                    slope[rows] += slopes.sum(-1)
        ctx.save_for_backward(*student[:3], *teacher[:3], *lses, slope)
        ctx.options, ctx.teacher_options, ctx.terms = options, teacher[3:], terms
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # to be read once: activation checkpointing refuses a second time
        student = _Operands(*saved[:3], *ctx.options)
        teacher = _Operands(*saved[3:6], *ctx.teacher_options)
        *lses, slope = saved[6:]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = slope.dtype
        hidden_grad = torch.zeros_like(student.hidden, dtype=dtype) if wants_hidden else None
        weight_grad = torch.zeros_like(student.weight) if wants_weight else None
        bias_grad = torch.zeros_like(student.bias) if wants_bias and student.bias is not None else None
        with torch.autocast(slope.device.type, enabled=False):
            for classes in _blocks(student.weight, 1):
                weight = student.weight[classes].to(dtype)
                class_grad, class_bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
                for rows in _blocks(student.hidden, 0):
                    logits, log_q, log_p = _log_probabilities(student, teacher, lses, rows, classes)
                    residual = ctx.terms(log_p, log_q)[1] - log_q.exp() * slope[rows, None]
                    if student.softcap is not None:
                        residual *= 1 - (logits / student.softcap).square()
                    residual *= student.scale * grad[rows, None]
                    if hidden_grad is not None:
                        hidden_grad[rows] += residual @ weight
                    if weight_grad is not None:
                        class_grad += residual.T @ student.hidden[rows].to(dtype)
                    class_bias += residual.sum(0)
                if weight_grad is not None:
                    weight_grad[classes] = class_grad.to(weight_grad.dtype)
                if bias_grad is not None:
                    bias_grad[classes] = class_bias.to(bias_grad.dtype)
        if hidden_grad is not None:
            hidden_grad = hidden_grad.to(student.hidden.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _log_probabilities(
    student: _Operands, teacher: _Operands, lses: Any, rows: slice, classes: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits of a tile, log Q and log P."""
    dtype = lses[0].dtype
    logits = student.tile(rows, classes, dtype)
    log_p = teacher.tile(rows, classes, dtype) - lses[1][rows, None].to(dtype)
    return logits, logits - lses[0][rows, None], log_p


def _blocks(vectors: Tensor, side: int) -> list[slice]:
    """A tile's rows (side 0) or classes (side 1), one block after another."""
    step = tile_shape(vectors.device, filtered=False)[side]
    return [slice(start, start + step) for start in range(0, vectors.shape[0], step)]
