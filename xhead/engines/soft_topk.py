"""The threshold of the soft top-k operator: t with `sum_j sigmoid(alpha (o_j + t)) = k`, a number a row and k.

With T the k largest logits, R the others and `x = alpha (o + t)`, it solves `sum_R sigmoid(x) = sum_T sigmoid(-x)`.
The difference of the logarithms of the two sides rises with t, is nearly linear where the k largest stand apart, and
keeps its digits there; the sum itself is k there whatever t. Newton's method runs inside a bracket, which is halved
where Newton would leave it. The implicit function theorem gives the gradient:

    dt/do_j = -v_j / sum_i v_i,      v_j = sigmoid(x_j) sigmoid(-x_j)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.engines.problem import Problem
from xhead.engines.row_functions import Processes, gradients, tiles_of, times_cap_slope, whole_rows
from xhead.engines.tiles import Tiles

_ITERATIONS = 64  # halvings alone would find all of float64's digits


def solve(logits: Tensor, k: int, alpha: float, scratch: Tensor, processes: Processes) -> Tensor:
    """The threshold of each row. logits: (r, V), as before afterwards; scratch: (r, V) -> (r,)

    Of processes that share the classes, each has its own logits, and all find the same threshold.
    """
    own, place = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    every = processes.gather(F.pad(own, (0, k + 1 - own.shape[1]), value=-math.inf)).movedim(0, 1).flatten(1)
    largest, chosen = every.topk(k + 1, dim=1)
    top, edge = largest[:, :k], largest[:, k]
    # Of equal logits, all processes take the same ones for the k largest.
    in_top = torch.zeros_like(every, dtype=torch.bool).scatter_(1, chosen[:, :k], True)
    in_top = in_top[:, processes.rank * (k + 1) :][:, : own.shape[1]]
    rest = logits.scatter_(1, place, own.masked_fill(in_top, -math.inf))
    low = -largest[:, k - 1] - math.log(processes.classes - k) / alpha
    high = -edge + math.log(k) / alpha
    torch.sub(rest, edge[:, None], out=scratch).mul_(alpha).exp_()
    log_rest = processes.sum(scratch.sum(1)).log_() + alpha * edge
    log_top = torch.logsumexp(-alpha * top, 1)
    # Exact where all sigmoids are exponentials: the k largest stand far apart.
    t = torch.clamp((log_top - log_rest) / (2 * alpha), low, high)
    for _ in range(_ITERATIONS):
        above = torch.sigmoid(-alpha * (top + t[:, None]))
        torch.add(rest, t[:, None], out=scratch).mul_(alpha).sigmoid_()
        below, squares = processes.sum(torch.stack([scratch.sum(1), _squares(scratch)]))
        sums = below, above.sum(1)
        slope = alpha * (2 - squares / sums[0] - _squares(above) / sums[1])
        difference = sums[0].log() - sums[1].log()
        low = torch.where(difference < 0, t, low)
        high = torch.where(difference < 0, high, t)
        step = difference / slope
        # Where both sides are this small, the first guess is exact to the last digit.
        exact = (sums[0] < 1e-30) & (sums[1] < 1e-30)
        settled = exact | (step.abs() * alpha <= 4 * torch.finfo(t.dtype).eps * (1 + alpha * t.abs()))
        if settled.all():
            break
        newton = t - step
        following = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        t = torch.where(settled, t, following)
    logits.scatter_(1, place, own)
    return t


def _squares(values: Tensor) -> Tensor:
    """`sum_j values_j^2` of each row without a copy. values: (r, V) -> (r,)"""
    return torch.linalg.vector_norm(values, dim=1).square()


def _log_slope(logits: Tensor, t: Tensor, alpha: float, scratch: Tensor, processes: Processes) -> Tensor:
    """`log sum_j v_j`, relative to the largest v: what is far from the threshold has a v that no float can hold."""
    torch.add(logits, t[:, None], out=scratch).mul_(alpha).abs_().neg_()
    own = scratch.amax(1) if scratch.shape[1] else torch.full_like(t, -math.inf)
    largest = processes.gather(own).amax(0)
    decay = scratch.exp()
    scratch.sub_(largest[:, None]).exp_().div_(decay.add_(1).square_())
    return processes.sum(scratch.sum(1)).log_() + largest


class _Residuals:
    """Of a tile: `-sum_m g_m v_j / sum v`, for the thresholds of each k."""

    def __init__(self, tiles: Tiles, threshold: Tensor, log_slope: Tensor, grad: Tensor, alpha: float):
        """threshold, log_slope, grad: (N, M)"""
        self.tiles, self.threshold, self.log_slope, self.grad, self.alpha = tiles, threshold, log_slope, grad, alpha

    def tile(self, logits: Tensor, first: int, last: int, start: int) -> Tensor:
        out = self.tiles.scratch(logits)
        share = self.tiles.scratch(logits, 2)
        for m in range(self.grad.shape[1]):
            threshold, log_slope, grad = (x[first:last, m, None] for x in (self.threshold, self.log_slope, self.grad))
            torch.add(logits, threshold, out=share).mul_(self.alpha).abs_().neg_()
            denominator = share.exp().add_(1).square_()
            share.sub_(log_slope).exp_().div_(denominator).mul_(-grad)
            out = out.copy_(share) if m == 0 else out.add_(share)
        return times_cap_slope(out, logits, self.tiles.problem.softcap)


@dataclass(frozen=True)
class SoftTopk:
    """The logits of the sets (E,), and the thresholds (N, len(ks)). Every k is at least 1 and below V.

    block_bytes: logits of whole rows held at a time, at least one row's; the forward takes three times as much.
    """

    ks: tuple[int, ...]
    alpha: float
    block_bytes: int

    def forward(self, problem: Problem, processes: Processes) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The results, and for the backward the thresholds and `log sum_j v_j`."""
        dtype = problem.accumulate_dtype
        threshold = torch.empty(problem.rows, len(self.ks), dtype=dtype, device=problem.hidden.device)
        log_slope = torch.empty_like(threshold)
        for rows, logits in whole_rows(problem, self.block_bytes, processes.most):
            scratch = torch.empty_like(logits)
            for place, k in enumerate(self.ks):
                t = solve(logits, k, self.alpha, scratch, processes)
                threshold[rows, place] = t
                log_slope[rows, place] = _log_slope(logits, t, self.alpha, scratch, processes)
        return (processes.column_logits(problem), threshold), (threshold, log_slope)

    def backward(
        self,
        problem: Problem,
        processes: Processes,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tiles = tiles_of(problem)
        (threshold, log_slope), (column_grad, threshold_grad) = saved, grads
        residuals = _Residuals(tiles, threshold, log_slope, threshold_grad, self.alpha)
        return gradients(tiles, residuals, column_grad[processes.held], needs)
