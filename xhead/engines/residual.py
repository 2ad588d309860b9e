"""The gradient of the statistics for the logits of one tile, from the logits and what the forward found a row.

With upstream gradients named after their statistic, and p = exp(o - lse):

    lse            g p_k                          entropy        -g p_k (o_k - sum_j p_j o_j)
    target         g 1[k = target] or g target_k  expectation    p_k sum_m g_m (values_km - expectation_m)
    mean           g c_k / sum(c)                 variance       2 g / V (o_k - mean)
    complement_lse g exp(o_k - complement_lse), 0 in the row's columns
    pointwise_sum  g s'(o_k)

Those of lse, entropy and expectation share p: together p_k (level + slope o_k + values_k . direction).
"""

import torch
from torch import Tensor

from xhead.engines.problem import Results
from xhead.engines.summands import SUMMANDS
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
        complement_only = "complement_lse" in grads and not self.softmax_wanted
        if complement_only:
            self._complement(logits, first, last, start, out)
        elif self.softmax_wanted:
            torch.sub(logits, self.found["lse"][rows, None], out=out).exp_().mul_(self._factor(logits, rows, start))
        else:
            out.zero_()
        if "complement_lse" in grads and not complement_only:
            out += self._complement(logits, first, last, start, self.tiles.scratch(logits, 2))
        if "pointwise_sum" in grads:
            assert problem.pointwise is not None
            slope = SUMMANDS[problem.pointwise].slope(logits, *problem.pointwise_parameters)
            out.addcmul_(slope, grads["pointwise_sum"][rows, None])
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

    def _complement(self, logits: Tensor, first: int, last: int, start: int, out: Tensor) -> Tensor:
        lse = self.found["complement_lse"][first:last, None]
        torch.sub(logits, lse.masked_fill(lse == float("-inf"), float("inf")), out=out).exp_()
        out[self.tiles.set_in(first, last, start)] = 0.0
        return out.mul_(self.grads["complement_lse"][first:last, None])

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
        row, column = self.tiles.targets_in(first, last, start)
        out[row, column] += grad[row]
