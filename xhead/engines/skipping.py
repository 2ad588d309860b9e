"""The compensated gradient filter on single entries: what is skipped is replaced by its closed form.

The classes are taken in the order of their mean logit over the rows, so that a tile's classes resemble each other and
the first tiles hold most of the mass. In a tile, the entries p_ik of at least the threshold, and the target's, are kept
and multiplied out as a sparse matrix. The others are replaced by the rank-one matrix with the same row and column sums,

    p_ik ~ m_ib q_k,      m_ib = sum of the row's skipped entries,      q_k = (column's skipped entries) / (tile's),

so that, with wbar_b = sum_k q_k w_k over the tile and g_i the upstream gradient,

    d hidden_i += g_i sum_b m_ib wbar_b,                  d w_k += q_k sum_i g_i m_ib h_i.

To that comes a tilt, which leaves the row and column sums as they are: with hbar the mean of the hidden states weighted
by their skipped mass m_i, and c_k the share of a column in all that is skipped,

    p_ik += tilt_i m_i c_k (h_i - hbar) . (w_k - wbar_b)
    d hidden_i += g_i tilt_i m_i G (h_i - hbar),                  G = sum_k c_k (w_k - wbar_b)(w_k - wbar_b)'
    d w_k += c_k (sum_i g_i m_i h_i (h_i - hbar)') (w_k - wbar_b)

For hidden states tilt_i makes the row's first moment exact. For the weight it is 1, the slope of exp: rare classes, far
below the threshold everywhere, learn from this term alone which contexts they belong to.

With a softcap, p is p times the cap's derivative and the tilt is left out, since the logits are not linear in the
hidden state. Tiles too dense for a sparse product are multiplied out whole; what does not fit the bounded memory of the
entries is found again in the backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.problem import Problem
from xhead.engines.tiles import Rows, Running, Tiles, tile_shape

_DENSE_SHARE = 1 / 8  # kept share of a tile above which two dense products cost less than two sparse ones
_ROW_BYTES, _ENTRY_BYTES = 1 << 21, 5 << 18  # from forward to backward: row masses and kept entries, whatever N and V
_DENSE_TILES = 0.75  # share of dense tiles above which the order of the classes costs more than the others save
SAVED, FOUND_AGAIN, DENSE = 0, 1, 2
_COMPATIBLE = {"lse", "target", "max", "argmax", "mean", "variance", "subset_lse"}


class SkippingState(NamedTuple):
    """What goes from the forward to the backward. Sizes depend on the shapes of the problem only."""

    order: Tensor  # (V,) the classes by falling mean logit
    column_mass: Tensor  # (V,) skipped mass of each class position
    row_mass: Tensor  # (S, tiles across) log of the skipped mass of the first S rows
    total_mass: Tensor  # (N,) skipped mass of each row
    first_moment: Tensor  # (N,) sum over the k skipped in saved tiles of p_ik o_ik
    kind: Tensor  # (tiles down, tiles across) `SAVED`, `FOUND_AGAIN` or `DENSE`
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
    rows, classes = tile_shape(problem.hidden.device, filtered=True)
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
            total_mass=empty(problem.rows),
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
    return None if state is None or bool((state.kind == DENSE).all()) else state


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
        state.kind.fill_(DENSE)
        state.span.zero_()
        state.column_mass.zero_()
        state.row_mass.fill_(float("-inf"))
        state.total_mass.zero_()
        state.first_moment.zero_()
        self.used = 0
        blocks_saved = -(-min(tiles.rows.count, state.row_mass.shape[0]) // tiles.shape[0])
        # A few tiles hold most entries. Those are found again, so that the memory serves the many that hold few.
        self.tile_budget = 4 * state.index.shape[0] // max(blocks_saved * state.kind.shape[1], 1)

    def record(self, logits: Tensor, share: Tensor, running: Running, rescale: Tensor, start: int) -> None:
        """logits and `share = exp(logits - shift)`: (n, c), both used up; rescale: (n,) from the last shift to this."""
        first, last, state = running.first, running.last, self.state
        moment = state.first_moment[first:last].mul_(rescale)
        total_mass = state.total_mass[first:last].mul_(rescale)
        if start == 0 and self.tiles.problem.filter.compensate:
            # The classes of the highest mean hold the most mass and are the least alike: one tile, multiplied out.
            return
        # What the row has summed so far is at most its final sum: no entry is skipped that the final one would keep.
        bound = self.tiles.problem.filter.threshold * running.total[:, None]
        kept = split(self.tiles, logits, share, bound, first, last, start)
        if kept is None:
            return
        down, across = first // self.tiles.shape[0], start // self.tiles.shape[1]
        state.column_mass[start : start + logits.shape[1]] += running.total.reciprocal() @ share
        total_mass += kept.row_mass
        count, row_budget = kept.index.shape[0], self._entries_until(last)
        state.kind[down, across] = FOUND_AGAIN
        if last <= state.row_mass.shape[0] and count <= self.tile_budget and self.used + count <= row_budget:
            state.kind[down, across] = SAVED
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
        rows, to_share = slice(running.first, running.last), (running.shift - lse).exp_()
        self.state.first_moment[rows] *= to_share
        self.state.total_mass[rows] *= to_share
        if (self.state.kind[running.first // self.tiles.shape[0]] == DENSE).float().mean() <= _DENSE_TILES:
            return True
        self.state.kind.fill_(DENSE)
        return False
