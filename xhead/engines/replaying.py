"""The backward side of the compensated filter: kept entries, and the closed form of the others, see `skipping`."""

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.residual import Gradients, Residual
from xhead.engines.skipping import DENSE, SAVED, Kept, SkippingState, split
from xhead.engines.tiles import Tiles


class Replayer:
    """Backward side: adds a tile's kept entries and the closed form of the others to the gradients."""

    def __init__(self, tiles: Tiles, residual: Residual, state: SkippingState):
        self.tiles, self.residual, self.state = tiles, residual, state
        self.options = tiles.problem.filter
        self.lse = residual.found["lse"]
        # With a cap, logits are not linear in the hidden state, and have no tilt of this form.
        self.tilted = self.options.compensate and tiles.problem.softcap is None
        self.total_mass = state.total_mass[: tiles.rows.count]
        self.all_mass = state.column_mass.sum().clamp(min=torch.finfo(self.lse.dtype).tiny)
        self.moment, self.mass = self.lse.new_zeros(2, tiles.rows.count)
        if self.tilted:
            self.mean_hidden = self._mean_hidden()

    def _mean_hidden(self) -> Tensor:
        """hbar: (D,)"""
        total = self.lse.new_zeros(self.tiles.problem.weight.shape[1])
        for first, last in self.tiles.row_blocks():
            total += self.total_mass[first:last] @ self.tiles.rows.hidden(first, last)
        return total / self.total_mass.sum().clamp(min=torch.finfo(total.dtype).tiny)

    def _covariance(self) -> tuple[Tensor, Tensor]:
        """`sum_i g_i m_i (h_i - hbar) h_i'` (D, D), and the same without the second factor (D,)."""
        size = self.mean_hidden.shape[0]
        covariance, total = self.lse.new_zeros(size, size), self.lse.new_zeros(size)
        for first, last in blocks(self.tiles.rows.count, size=128):
            hidden = self.tiles.rows.hidden(first, last)
            mass = self.total_mass[first:last] * self.residual.level[first:last]
            centred = (hidden - self.mean_hidden).mul_(mass[:, None])
            covariance.addmm_(centred.T, hidden)
            total += centred.sum(0)
        return covariance, total

    def begin_classes(self, weight: Tensor, start: int) -> None:
        """The tile's column shares and mean row. weight: (c, D), the classes from position `start` on."""
        column_mass = self.state.column_mass[start : start + weight.shape[0]]
        total = column_mass.sum()
        # Nothing skipped in these columns: any shares do, since the rows' masses are 0.
        self.share = torch.where(total > 0, column_mass / total, torch.ones_like(column_mass) / weight.shape[0])
        bias = self.tiles.problem.bias
        if bias is None:
            self.bias = weight.new_zeros(weight.shape[0])
        else:
            self.bias = bias[self.tiles.classes(start, start + weight.shape[0])].to(weight.dtype)
        self.mean, self.mean_bias = self.share @ weight, self.share @ self.bias

    def _centred(self, start: int, stop: int) -> Tensor:
        """`w_k - wbar_b` of a tile's classes: (c, D)."""
        weight = self.tiles.weight(start, stop)
        self.begin_classes(weight, start)
        return weight.sub_(self.mean)

    def add(
        self, gradients: Gradients, hidden: Tensor, weight: Tensor, first: int, last: int, start: int
    ) -> Gradients | None:
        """Add what the filter may answer for this tile; returns the gradients that are left to the exact product."""
        filtered, exact = gradients.split(self.options.hidden_grad, self.options.weight_grad)
        kept = self._kept(hidden, weight, first, last, start) if filtered is not None else None
        if kept is None or filtered is None:
            return gradients
        filtered.add_sparse(*self._entries(kept, first, last, start, weight.shape[0]), hidden, weight)
        if self.options.compensate:
            mass = kept.row_mass * self.residual.level[first:last]
            filtered.add_rank_one(mass, self.share, self.mean, hidden)
            if self.tilted:
                centre = (hidden @ self.mean + self.mean_bias) * self.tiles.problem.scale
                self.moment[first:last] -= kept.row_mass * centre
                self.mass[first:last] += kept.row_mass
        return exact

    def _kept(self, hidden: Tensor, weight: Tensor, first: int, last: int, start: int) -> Kept | None:
        down, across = first // self.tiles.shape[0], start // self.tiles.shape[1]
        kind, (begin, count) = int(self.state.kind[down, across]), self.state.span[down, across].tolist()
        if kind == DENSE:
            return None
        lse = self.lse[first:last, None]
        if kind == SAVED:
            entries = slice(begin, begin + count)
            row_mass = (self.state.row_mass[first:last, across] - lse[:, 0]).exp_()
            return Kept(self.state.index[entries].long(), self.state.logit[entries], row_mass)
        logits = self.tiles.logits(hidden, weight, start)
        share = torch.sub(logits, lse, out=self.tiles.scratch(logits)).exp_()
        kept = split(self.tiles, logits, share, self.options.threshold, first, last, start)
        if kept is not None and self.tilted:
            self.moment[first:last] += logits.mul_(share).sum(1)
        return kept

    def _entries(self, kept: Kept, first: int, last: int, start: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(row, column, d loss / d (h~ . w~)) of the kept entries, the rows' targets among them."""
        problem, residual = self.tiles.problem, self.residual
        row, column = kept.index // width, kept.index % width
        level = residual.level[first:last]
        value = (kept.logit - self.lse[first:last][row]).exp_() * level[row]
        logit = kept.logit
        if problem.target is not None:
            inside, local = self.tiles.target_in(first, last, start, start + width)
            rows = inside.nonzero().squeeze(1)
            target = residual.found["target"][first:last][rows]
            target_value = (target - self.lse[first:last][rows]).exp_() * level[rows]
            if "target" in residual.grads:
                target_value += residual.grads["target"][first:last][rows]
            row, column = torch.cat([row, rows]), torch.cat([column, local[rows]])
            value, logit = torch.cat([value, target_value]), torch.cat([logit, target])
        if problem.softcap is not None:
            value *= 1 - (logit / problem.softcap).square_()
        return row, column, value

    def finish_hidden(self, hidden_grad: Tensor) -> None:
        """Add the tilt of the hidden states' gradient. hidden_grad: (n, D)"""
        if not (self.tilted and self.options.hidden_grad):
            return
        gram, with_bias = self._gram()
        square = self.tiles.problem.scale**2
        moment = self.moment + self.state.first_moment[: self.moment.shape[0]]
        for first, last in blocks(self.tiles.rows.count, size=128):
            hidden = self.tiles.rows.hidden(first, last)
            centred = hidden - self.mean_hidden
            product = centred @ gram
            mass = self.mass[first:last]
            spread = ((product * hidden).sum(1) + centred @ with_bias) * square * mass
            # Where the skipped logits hardly vary there is no tilt to speak of, and the quotient is noise.
            tilt = (moment[first:last] / spread).nan_to_num(0.0).clamp_(0.0, _TILT_LIMIT)
            hidden_grad[first:last].addcmul_(product, (tilt * mass * self.residual.level[first:last] * square)[:, None])

    def finish_weight(self, weight_grad: Tensor | None, bias_grad: Tensor | None) -> None:
        """Add the tilt of the weight's and the bias's gradient. weight_grad: (V, D), bias_grad: (V,)

        A second pass over the classes, so that the (D, D) moment is not held beside the tiles of the first.
        """
        if not (self.tilted and self.options.weight_grad) or (weight_grad is None and bias_grad is None):
            return
        covariance, total = self._covariance()
        square = self.tiles.problem.scale**2
        for start, stop in self.tiles.class_blocks():
            classes, centred = self.state.order[start:stop], self._centred(start, stop)
            centred.mul_(self.state.column_mass[start:stop, None]).mul_(square / self.all_mass)
            if weight_grad is not None:
                weight_grad.index_add_(0, classes, (centred @ covariance).to(weight_grad.dtype))
            if bias_grad is not None:
                bias_grad.index_add_(0, classes, centred @ total)

    def _gram(self) -> tuple[Tensor, Tensor]:
        """G (D, D), and `sum_k c_k (bias_k - mean bias_b)(w_k - wbar_b)` (D,), up to a factor common to both.

        Over the first classes, which hold half of all that is skipped: `tilt_i` is a quotient by G, so its size is
        free.
        """
        size = self.mean_hidden.shape[0]
        gram, with_bias = self.lse.new_zeros(size, size), self.lse.new_zeros(size)
        seen = 0.0
        for start, stop in self.tiles.class_blocks():
            column_mass = self.state.column_mass[start:stop]
            root = (column_mass / self.all_mass).sqrt()
            centred = self._centred(start, stop).mul_(root[:, None])
            gram.addmm_(centred.T, centred)
            with_bias += ((self.bias - self.mean_bias) * root) @ centred
            seen += float(column_mass.sum() / self.all_mass)
            if seen > _GRAM_SHARE:
                break
        return gram, with_bias


_GRAM_SHARE = 0.5
_TILT_LIMIT = 2.0  # exp has slope 1 where it is not cut off by the threshold, and less where it is
