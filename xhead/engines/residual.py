"""The gradient of the statistics for the logits of one tile, from the logits and what the forward found a row.

With upstream gradients named after their statistic, and p = exp(o - lse):

    lse            g p_k                          entropy        -g p_k (o_k - sum_j p_j o_j)
    target         g 1[k = target] or g target_k  expectation    p_k sum_m g_m (values_km - expectation_m)
    mean           g c_k / sum(c)                 variance       2 g / V (o_k - mean)
    complement_lse g exp(o_k - complement_lse), 0 in the row's columns

Those of lse, entropy and expectation share p: together p_k (level + slope o_k + values_k . direction).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.problem import Results
from xhead.engines.tiles import RULED_OUT, Tiles


class Residual:
    """d loss / d (h~ . w~) a tile, `scale` apart."""

    def __init__(self, tiles: Tiles, found: Results, grads: Results):
        """found and grads: (n,) or (n, M) for the counted rows."""
        self.tiles, self.grads, self.found = tiles, grads, found
        zero = torch.zeros(tiles.rows.count, dtype=tiles.problem.accumulate_dtype, device=tiles.problem.hidden.device)
        self.level = grads.get("lse", zero)
        self.slope = self.direction = None
        if "entropy" in grads:
            self.slope = -grads["entropy"]
            self.level = self.level + grads["entropy"] * (found["lse"] - found["entropy"])
        if "expectation" in grads:
            self.direction = grads["expectation"]
            self.level = self.level - (self.direction * found["expectation"]).sum(1)
        self.softmax_wanted = any(name in grads for name in ("lse", "entropy", "expectation"))

    def tile(self, logits: Tensor, first: int, last: int, start: int) -> Tensor:
        """(n, c), valid until the next call. logits: (n, c), rows first to last, classes from `start` on."""
        problem, grads, stop = self.tiles.problem, self.grads, start + logits.shape[1]
        rows = slice(first, last)
        out = self.tiles.scratch(logits)
        if self.softmax_wanted:
            torch.sub(logits, self.found["lse"][rows, None], out=out).exp_().mul_(self._factor(logits, rows, start))
        else:
            out.zero_()
        if "complement_lse" in grads:
            out += self._complement(logits, first, last, start)
        if "mean" in grads:
            share = self._mean_share(start, stop, out)
            out.addcmul_(grads["mean"][rows, None], share[None, :])
        if "variance" in grads:
            centred = logits - self.found["uniform_mean"][rows, None]
            out.addcmul_(centred, grads["variance"][rows, None], value=2 / problem.vocabulary)
        if "target" in grads:
            self._add_target(out, first, last, start, stop)
        if problem.softcap is not None:
            out.addcmul_(out, (logits / problem.softcap).square_(), value=-1)
        return out

    def _factor(self, logits: Tensor, rows: slice, start: int) -> Tensor:
        factor = self.level[rows, None]
        if self.slope is not None:
            # p is 0 where the logit is -inf, and 0 * -inf would be NaN.
            factor = factor + self.slope[rows, None] * logits.clamp(min=RULED_OUT)
        if self.direction is not None:
            values = self.tiles.problem.values
            assert values is not None
            factor = factor + self.direction[rows] @ values[start : start + logits.shape[1]].to(logits.dtype).T
        return factor

    def _complement(self, logits: Tensor, first: int, last: int, start: int) -> Tensor:
        lse = self.found["complement_lse"][first:last, None]
        share = (logits - lse.masked_fill(lse == float("-inf"), float("inf"))).exp_()
        row, column = self.tiles.set_in(first, last, start, start + logits.shape[1])
        share[row, column] = 0.0
        return share.mul_(self.grads["complement_lse"][first:last, None])

    def _mean_share(self, start: int, stop: int, like: Tensor) -> Tensor:
        mean_weight, classes = self.tiles.problem.mean_weight, self.tiles.problem.vocabulary
        if mean_weight is None:
            return like.new_full((stop - start,), 1 / classes)
        return (mean_weight[start:stop] / mean_weight.sum()).to(like.dtype)

    def _add_target(self, out: Tensor, first: int, last: int, start: int, stop: int) -> None:
        grad, target = self.grads["target"][first:last], self.tiles.target
        assert target is not None
        if target.ndim == 2:
            out.addcmul_(grad[:, None], target[first:last, start:stop].to(out.dtype))
            return
        inside, local = self.tiles.target_in(first, last, start, stop)
        out.scatter_add_(1, local[:, None], grad.masked_fill(~inside, 0.0)[:, None])


class Gradients(NamedTuple):
    """Accumulators of a tile's gradients; None where a gradient is not wanted."""

    hidden: Tensor | None  # (n, D)
    weight: Tensor | None  # (c, D)
    bias: Tensor | None  # (c,)
    scale: float

    def split(self, hidden: bool, weight: bool) -> tuple["Gradients | None", "Gradients | None"]:
        """The accumulators of the sides that are True, and the others; None for neither."""
        chosen = Gradients(
            self.hidden if hidden else None, self.weight if weight else None, self.bias if weight else None, self.scale
        )
        others = Gradients(
            None if hidden else self.hidden, None if weight else self.weight, None if weight else self.bias, self.scale
        )
        return chosen.or_none(), others.or_none()

    def or_none(self) -> "Gradients | None":
        """None where nothing is accumulated."""
        return self if any(accumulator is not None for accumulator in self[:3]) else None

    def add(self, residual: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """residual: (n, c), hidden: (n, D), weight: (c, D)"""
        if self.hidden is not None:
            self.hidden.addmm_(residual, weight, alpha=self.scale)
        if self.weight is not None:
            self.weight.addmm_(residual.T, hidden, alpha=self.scale)
        if self.bias is not None:
            self.bias.add_(residual.sum(0), alpha=self.scale)

    def add_sparse(self, row: Tensor, column: Tensor, value: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """The same for a residual of few entries. row, column, value: (E,)"""
        if self.hidden is not None:
            _add_weighted_rows(self.hidden, row, column, value * self.scale, weight)
        if self.weight is not None:
            _add_weighted_rows(self.weight, column, row, value * self.scale, hidden)
        if self.bias is not None:
            self.bias.index_add_(0, column, value, alpha=self.scale)

    def add_rank_one(self, row: Tensor, column: Tensor, mean: Tensor, hidden: Tensor) -> None:
        """The same for a residual `row column'`, given `mean = column' weight`. row: (n,), column: (c,), mean: (D,)"""
        if self.hidden is not None:
            self.hidden.addr_(row, mean, alpha=self.scale)
        if self.weight is not None:
            self.weight.addr_(column, row @ hidden, alpha=self.scale)
        if self.bias is not None:
            self.bias.add_(column, alpha=float(row.sum()) * self.scale)


def _add_weighted_rows(out: Tensor, position: Tensor, source: Tensor, value: Tensor, table: Tensor) -> None:
    """`out[position] += value * table[source]`, summed over repeats. out: (n, D), table: (c, D), the others (E,)"""
    if position.numel() == 0:
        return
    position, order = position.sort()
    source, value = source[order], value[order]
    offsets = torch.searchsorted(position, torch.arange(out.shape[0] + 1, device=out.device))
    for first, last in blocks(out.shape[0], size=_BAG_ROWS):
        begin, end = offsets[first], offsets[last]
        bags = offsets[first:last] - begin
        out[first:last] += F.embedding_bag(
            source[begin:end], table, bags, mode="sum", per_sample_weights=value[begin:end]
        )


_BAG_ROWS = 128  # summed at a time, so that the sum does not take another accumulator's memory
