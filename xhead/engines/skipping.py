"""The compensated gradient filter on single entries: what is skipped is replaced by its closed form.

The classes are taken in the order of their mean logit over the rows, so that a tile's classes resemble each other and
the first tiles hold most of the mass. In a tile, the entries p_ik of at least the threshold, and the target's, are kept
and multiplied out as a sparse matrix. The others are replaced by the rank-one matrix with the same row and column sums,

    p_ik ~ m_ib q_k,      m_ib = sum of the row's skipped entries,      q_k = (column's skipped entries) / (tile's),

so that, with wbar_b = sum_k q_k w_k over the tile and g_i the upstream gradient,

    d hidden_i += g_i sum_b m_ib wbar_b,                  d w_k += q_k sum_i g_i m_ib h_i.

Hidden states see the tilt inside the tiles as well. With G = sum_k c_k (w_k - wbar_b)(w_k - wbar_b)', pooled over the
tiles, c the share of each column in all that is skipped, and a factor that makes the row's first moment exact,

    d hidden_i += g_i tilt_i G h_i,      tilt_i = sum over skipped k of p_ik (o_ik - obar_ib) / (h_i' G h_i).

With a softcap, p is p times the cap's derivative and the tilt is left out, since the logits are not linear in the
hidden state. Tiles too dense for a sparse product are multiplied out whole; what does not fit the bounded memory of the
entries is found again in the backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.problem import Problem
from xhead.engines.residual import Gradients, Residual
from xhead.engines.tiles import Rows, Running, Tiles, tile_shape

_DENSE_SHARE = 1 / 8  # kept share of a tile above which two dense products cost less than two sparse ones
_ROW_BYTES, _ENTRY_BYTES = 1 << 21, 5 << 18  # from forward to backward: row masses and kept entries, whatever N and V
_DENSE_TILES = 0.75  # share of dense tiles above which the order of the classes costs more than the others save
_SAVED, _FOUND_AGAIN, _DENSE = 0, 1, 2
_COMPATIBLE = {"lse", "target", "max", "argmax", "mean", "variance", "subset_lse"}


class SkippingState(NamedTuple):
    """What goes from the forward to the backward. Sizes depend on the shapes of the problem only."""

    order: Tensor  # (V,) the classes by falling mean logit
    column_mass: Tensor  # (V,) skipped mass of each class position
    row_mass: Tensor  # (S, tiles across) log of the skipped mass of the first S rows
    first_moment: Tensor  # (N,) sum over the k skipped in saved tiles of p_ik o_ik
    kind: Tensor  # (tiles down, tiles across) `_SAVED`, `_FOUND_AGAIN` or `_DENSE`
    span: Tensor  # (tiles down, tiles across, 2) where the tile's entries start, and how many there are
    index: Tensor  # (entries,) flat position inside the tile
    logit: Tensor  # (entries,)


def wanted(problem: Problem, save: bool) -> bool:
    """Whether the gradient of this problem is filtered: a threshold, and the plain log-sum-exp alone to filter."""
    options = problem.filter
    return (
        save
        and options.threshold > 0.0
        and (options.hidden_grad or options.weight_grad)
        and "lse" in problem.names
        and _COMPATIBLE.issuperset(problem.names)
        and not problem.soft_target
        and (problem.softcap is None or not {"mean", "variance"}.intersection(problem.names))
    )


def empty_state(problem: Problem, save: bool) -> list[Tensor]:
    """The state's tensors, unfilled; none where nothing is filtered."""
    if not wanted(problem, save):
        return []
    rows, classes = tile_shape(problem.hidden.device)
    down, across = -(-problem.rows // rows), -(-problem.vocabulary // classes)
    item = torch.finfo(problem.accumulate_dtype).bits // 8
    saved_rows = min(problem.rows, max(_ROW_BYTES // (item * across), 1))
    entries = _ENTRY_BYTES // (item + 4)

    def empty(*shape: int, dtype: torch.dtype = problem.accumulate_dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=problem.hidden.device)

    return list(
        SkippingState(
            order=empty(problem.vocabulary, dtype=torch.int32),
            column_mass=empty(problem.vocabulary),
            row_mass=empty(saved_rows, across),
            first_moment=empty(problem.rows),
            kind=empty(down, across, dtype=torch.uint8),
            span=empty(down, across, 2, dtype=torch.int64),
            index=empty(entries, dtype=torch.int32),
            logit=empty(entries),
        )
    )


def mean_logit_order(problem: Problem, rows: Rows) -> Tensor:
    """The classes by falling mean of their (uncapped) logits: one matrix-vector product."""
    total = torch.zeros(problem.hidden.shape[1], dtype=problem.accumulate_dtype, device=problem.hidden.device)
    for start, stop in blocks(rows.count):
        total += rows.hidden(start, stop).sum(0)
    mean = torch.cat([problem.weight[start:stop].to(total.dtype) @ total for start, stop in blocks(problem.vocabulary)])
    mean /= max(rows.count, 1)
    if problem.bias is not None:
        mean += problem.bias
    # An order must exist for NaN too, so that it comes out of the statistics and not of the sort.
    return mean.nan_to_num().argsort(descending=True).int()


def restore(tensors: list[Tensor]) -> SkippingState | None:
    """What the forward recorded; None where it recorded nothing, or found every tile dense."""
    state = SkippingState(*tensors) if tensors else None
    return None if state is None or bool((state.kind == _DENSE).all()) else state


class Kept(NamedTuple):
    """The entries of a tile that are multiplied out, and the mass of those that are not."""

    index: Tensor  # (E,) flat position inside the tile
    logit: Tensor  # (E,)
    row_mass: Tensor  # (n,)


def split(
    tiles: Tiles, logits: Tensor, share: Tensor, threshold: Tensor | float, first: int, last: int, start: int
) -> Kept | None:
    """Split a tile in what is kept and what is skipped; None where too much would be kept.

    share: (n, c) proportional to p a row, and left 0 where kept or the target's; threshold: (n, 1), in the same unit.
    """
    problem = tiles.problem
    if problem.target is not None:
        inside, local = tiles.target_in(first, last, start, start + logits.shape[1])
        share.scatter_(1, local[:, None], share.gather(1, local[:, None]).masked_fill_(inside[:, None], 0.0))
    kept = share >= threshold
    if kept.count_nonzero() > _DENSE_SHARE * logits.numel():
        return None
    index = kept.view(-1).nonzero().squeeze(1)
    logit = logits.view(-1)[index]
    share.view(-1)[index] = 0.0
    if problem.softcap is not None:
        share.addcmul_(share, (logits / problem.softcap).square_(), value=-1)
    return Kept(index, logit, share.sum(1))


class Recorder:
    """Forward side: watches the tiles go by and fills the state."""

    def __init__(self, tiles: Tiles, state: SkippingState):
        self.tiles, self.state = tiles, state
        assert tiles.order is not None
        state.order.copy_(tiles.order)
        state.kind.fill_(_DENSE)
        state.span.zero_()
        state.column_mass.zero_()
        state.row_mass.fill_(float("-inf"))
        state.first_moment.zero_()
        self.used = 0

    def record(self, logits: Tensor, share: Tensor, running: Running, rescale: Tensor, start: int) -> None:
        """logits and `share = exp(logits - shift)`: (n, c), both used up; rescale: (n,) from the last shift to this."""
        if start < self.tiles.problem.filter.compensate * self.tiles.shape[1]:
            return
        first, last, state = running.first, running.last, self.state
        moment = state.first_moment[first:last].mul_(rescale)
        # What the row has summed so far is at most its final sum: no entry is skipped that the final one would keep.
        bound = self.tiles.problem.filter.threshold * running.total[:, None]
        kept = split(self.tiles, logits, share, bound, first, last, start)
        if kept is None:
            return
        down, across = first // self.tiles.shape[0], start // self.tiles.shape[1]
        state.column_mass[start : start + logits.shape[1]] += running.total.reciprocal() @ share
        count, row_budget = kept.index.shape[0], self._entries_until(last)
        state.kind[down, across] = _FOUND_AGAIN
        if last <= state.row_mass.shape[0] and self.used + count <= row_budget:
            state.kind[down, across] = _SAVED
            state.row_mass[first:last, across] = kept.row_mass.log() + running.shift
            state.span[down, across] = torch.tensor([self.used, count])
            state.index[self.used : self.used + count] = kept.index
            state.logit[self.used : self.used + count] = kept.logit
            self.used += count
            if self.tiles.problem.softcap is None:
                moment += logits.mul_(share).sum(1)

    def _entries_until(self, last: int) -> int:
        """Each block of rows has its part of the memory, so that the last are served as the first."""
        rows = min(self.tiles.rows.count, self.state.row_mass.shape[0])
        return self.state.index.shape[0] * min(last, rows) // max(rows, 1)

    def finish_rows(self, running: Running, lse: Tensor) -> bool:
        """Close a block of rows. False where so little can be skipped that the filter had better stand aside."""
        self.state.first_moment[running.first : running.last] *= (running.shift - lse).exp_()
        if (self.state.kind[running.first // self.tiles.shape[0]] == _DENSE).float().mean() <= _DENSE_TILES:
            return True
        self.state.kind.fill_(_DENSE)
        return False


class Replayer:
    """Backward side: adds a tile's kept entries and the closed form of the others to the gradients."""

    def __init__(self, tiles: Tiles, residual: Residual, state: SkippingState, hidden_wanted: bool):
        self.tiles, self.residual, self.state = tiles, residual, state
        self.options = tiles.problem.filter
        self.lse = residual.found["lse"]
        self.tilted = hidden_wanted and self.options.hidden_grad and self.options.compensate
        self.tilted &= tiles.problem.softcap is None
        size = tiles.problem.weight.shape[1]
        self.gram = self.lse.new_zeros(size + 1, size + 1) if self.tilted else None
        self.moment, self.mass = self.lse.new_zeros(2, tiles.rows.count)

    def begin_classes(self, weight: Tensor, start: int) -> None:
        """The tile's column shares and mean row. weight: (c, D), the classes from position `start` on."""
        column_mass = self.state.column_mass[start : start + weight.shape[0]]
        total = column_mass.sum()
        # Nothing skipped in these columns: any shares do, since the rows' masses are 0.
        self.share = torch.where(total > 0, column_mass / total, torch.ones_like(column_mass) / weight.shape[0])
        bias = self.tiles.problem.bias
        if bias is None:
            bias_tile = weight.new_zeros(weight.shape[0])
        else:
            bias_tile = bias[self.tiles.classes(start, start + weight.shape[0])].to(weight.dtype)
        self.mean, self.mean_bias = self.share @ weight, self.share @ bias_tile
        if self.gram is not None:
            root = column_mass.sqrt()
            centred = (weight - self.mean).mul_(root[:, None])
            centred_bias = (bias_tile - self.mean_bias) * root
            self.gram[:-1, :-1].addmm_(centred.T, centred)
            self.gram[-1, :-1] += centred_bias @ centred
            self.gram[-1, -1] += centred_bias.square().sum()

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
        if kind == _DENSE:
            return None
        lse = self.lse[first:last, None]
        if kind == _SAVED:
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
        """Add the tilt. hidden_grad: (n, D)"""
        if self.gram is None:
            return
        scale = self.tiles.problem.scale
        # The columns' masses were summed over rows; as shares they sum to 1.
        gram = self.gram.div_(self.state.column_mass.sum().clamp(min=torch.finfo(self.gram.dtype).tiny))
        moment = self.moment + self.state.first_moment[: self.moment.shape[0]]
        for first, last in blocks(self.tiles.rows.count, size=128):
            hidden = self.tiles.rows.hidden(first, last)
            product = torch.addmm(gram[-1, :-1], hidden, gram[:-1, :-1])
            spread = scale**2 * ((product + gram[-1, :-1]) * hidden).sum(1).add_(gram[-1, -1])
            mass = self.mass[first:last]
            # Where all skipped logits are alike there is no tilt to speak of, and the quotient is noise.
            tilt = (moment[first:last] / (mass * spread).clamp(min=1e-12)).clamp_(-_TILT_LIMIT, _TILT_LIMIT)
            factor = tilt * mass * self.residual.level[first:last] * scale**2
            hidden_grad[first:last].addcmul_(product, factor[:, None])


_TILT_LIMIT = 2.0  # exp(o) has slope 1 around the mean; below a threshold it is flatter, never twice as steep
