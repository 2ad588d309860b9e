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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.problem import Problem, cap
from xhead.engines.tiles import Rows, Running, Tiles, tile_shape

_DENSE_SHARE = 1 / 8  # kept share of a tile above which two dense products cost less than two sparse ones
_ROW_BYTES, _ENTRY_BYTES = 1 << 21, 1 << 20  # from forward to backward: row masses and kept entries, whatever N and V
_PROBE_ROWS = 8
_PROBE_SHARE = 1 / 40  # kept share of the probed rows above which the exact gradient is about as fast, or faster
SAVED, FOUND_AGAIN, DENSE = 0, 1, 2
_COMPATIBLE = {"lse", "target", "max", "argmax", "mean", "variance", "subset_lse", "column_logits"}


class SkippingState(NamedTuple):
    """What goes from the forward to the backward. Sizes depend on the shapes of the problem only."""

    order: Tensor  # (V,) the classes by falling mean logit
    column_mass: Tensor  # (V,) skipped mass of each class position
    mean_weight: Tensor  # (tiles across, D) wbar
    mean_bias: Tensor  # (tiles across,) the same of the bias
    row_mass: Tensor  # (S, tiles across) log of the skipped mass of the first S rows, in saved tiles
    total_mass: Tensor  # (N,) skipped mass of each row
    first_moment: Tensor  # (N,) sum over the k skipped in saved tiles of p_ik o_ik
    kind: Tensor  # (tiles down, tiles across) `SAVED`, `FOUND_AGAIN` or `DENSE`
    count: Tensor  # (tiles down, tiles across) entries of each saved tile; they lie one tile after another
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
            mean_weight=empty(across, problem.weight.shape[1]),
            mean_bias=empty(across),
            row_mass=empty(saved_rows, across),
            total_mass=empty(problem.rows),
            first_moment=empty(problem.rows),
            kind=empty(down, across, dtype=torch.uint8),
            count=empty(down, across, dtype=torch.int32),
            index=empty(entries, dtype=torch.int32),
            logit=empty(entries),
        )
    )


def class_order(problem: Problem, rows: Rows) -> Tensor | None:
    """The classes by falling mean of their (uncapped) logits: one thin product with the weight.

    None where no row counts, or where a few rows show that so much would be kept that the exact gradient is faster.
    """
    if not rows.count:
        return None
    options = {"dtype": problem.accumulate_dtype, "device": problem.hidden.device}
    total = torch.zeros(problem.hidden.shape[1], **options)
    for start, stop in blocks(rows.count):
        total += rows.hidden(start, stop).sum(0)
    probed = [total[None] / rows.count]
    # A row keeps at most 1 / threshold entries.
    most = _most_kept.get()
    if 1 / problem.filter.threshold > most * problem.vocabulary:
        step = -(-rows.count // _PROBE_ROWS)
        probed += [rows.hidden(row, row + 1) for row in range(step // 2, rows.count, step)]
    directions = torch.cat(probed).T.contiguous()
    products = torch.empty(problem.vocabulary, directions.shape[1], **options)
    for start, stop in blocks(problem.vocabulary, size=_PROBE_CLASSES):
        torch.mm(problem.weight[start:stop].to(directions.dtype), directions, out=products[start:stop])
    if problem.bias is not None:
        products += problem.bias[:, None]
    if directions.shape[1] > 1:
        p = cap(products[:, 1:] * problem.scale, problem.softcap).softmax(0)
        if (p >= problem.filter.threshold).float().mean() > most:
            return None
    # An order must exist for NaN too, so that it comes out of the statistics and not of the sort.
    return products[:, 0].nan_to_num().argsort(descending=True).int()


_PROBE_CLASSES = 4096


_most_kept = ContextVar("_most_kept", default=_PROBE_SHARE)


@contextmanager
def always() -> Iterator[None]:
    """Within it the filter never stands aside: to measure and test it where it does not pay."""
    token = _most_kept.set(1.0)
    try:
        yield
    finally:
        _most_kept.reset(token)


def restore(tensors: list[Tensor]) -> SkippingState | None:
    """What the forward recorded; None where it recorded nothing, or stood aside."""
    state = SkippingState(*tensors) if tensors else None
    return None if state is None or bool((state.kind == DENSE).all()) else state


def stand_aside(tensors: list[Tensor]) -> None:
    """Fill a state in which nothing is skipped."""
    if tensors:
        SkippingState(*tensors).kind.fill_(DENSE)


class Kept(NamedTuple):
    """The entries of a tile that are multiplied out, and the mass of those that are not."""

    index: Tensor  # (E,) flat position inside the tile
    logit: Tensor  # (E,)
    row_mass: Tensor  # (n,)


def split(
    tiles: Tiles,
    logits: Tensor,
    share: Tensor,
    threshold: Tensor | float,
    first: int,
    last: int,
    start: int,
    *,
    all_may_be_kept: bool = False,
) -> Kept | None:
    """Split a tile in what is kept and what is skipped; None where too much would be kept.

    share: (n, c) proportional to p a row, and left 0 where kept or the target's; threshold: (n, 1), in the same unit.
    """
    problem = tiles.problem
    if problem.target is not None:
        row, column = tiles.targets_in(first, last, start)
        share[row, column] = 0.0
    kept = share >= threshold
    if not all_may_be_kept and kept.count_nonzero() > _DENSE_SHARE * logits.numel():
        return None
    index = kept.view(-1).nonzero().squeeze(1).int()
    logit = logits.view(-1)[index]
    share.view(-1)[index] = 0.0
    if problem.softcap is not None:
        share.addcmul_(share, (logits / problem.softcap).square_(), value=-1)
    return Kept(index, logit, share.sum(1))


class Recorder:
    """Forward side: watches the tiles go by and fills the state."""

    def __init__(self, tiles: Tiles, state: SkippingState):
        self.tiles, self.state = tiles, state
        self.compensate = tiles.problem.filter.compensate
        self.capped = tiles.problem.softcap is not None
        assert tiles.order is not None
        state.order.copy_(tiles.order)
        for tensor in (state.column_mass, state.mean_weight, state.mean_bias, state.total_mass, state.first_moment):
            tensor.zero_()
        state.row_mass.fill_(float("-inf"))
        down, across = state.kind.shape
        self.kind = [[DENSE] * across for _ in range(down)]
        self.count = [[0] * across for _ in range(down)]
        self.used = 0
        blocks_saved = -(-min(tiles.rows.count, state.row_mass.shape[0]) // tiles.shape[0])
        # A few tiles hold most entries. Those are found again, so that the memory serves the many that hold few.
        self.tile_budget = _BUDGET_OF_MEAN * state.index.shape[0] // max(blocks_saved * across, 1)

    def record(
        self, logits: Tensor, share: Tensor, weight: Tensor, running: Running, rescale: Tensor, start: int
    ) -> None:
        """Take a tile in.

        logits and `share = exp(logits - shift)`: (n, c), both used up; weight: (c, D); rescale: (n,) from the last
        shift to this.
        """
        first, last, state = running.first, running.last, self.state
        if self.compensate:
            state.total_mass[first:last] *= rescale
            state.first_moment[first:last] *= rescale
        if start == 0 and self.compensate:
            # The classes of the highest mean hold the most mass and are the least alike: one tile, multiplied out.
            return
        # What the row has summed so far is at most its final sum: no entry is skipped that the final one would keep.
        bound = self.tiles.problem.filter.threshold * running.total[:, None]
        kept = split(self.tiles, logits, share, bound, first, last, start)
        down, across, stop = first // self.tiles.shape[0], start // self.tiles.shape[1], start + logits.shape[1]
        if kept is not None:
            count = kept.index.shape[0]
            saved = last <= state.row_mass.shape[0] and count <= self.tile_budget
            saved = saved and self.used + count <= state.index.shape[0]
            self.kind[down][across] = SAVED if saved else FOUND_AGAIN
            if saved:
                self._save(kept, down, across)
            if self.compensate:
                state.column_mass[start:stop] += running.total.reciprocal() @ share
                self._add_masses(kept, logits, share, running, across if saved else None)
        if self.compensate and last == self.tiles.rows.count:
            self._finish_columns(weight, start, stop, across)

    def _save(self, kept: Kept, down: int, across: int) -> None:
        first, last = self.used, self.used + kept.index.shape[0]
        self.state.index[first:last] = kept.index
        self.state.logit[first:last] = kept.logit
        self.count[down][across] = last - first
        self.used = last

    def _add_masses(self, kept: Kept, logits: Tensor, share: Tensor, running: Running, saved: int | None) -> None:
        rows, state = slice(running.first, running.last), self.state
        state.total_mass[rows] += kept.row_mass
        if saved is not None:
            torch.add(kept.row_mass.log(), running.shift, out=state.row_mass[rows, saved])
            if not self.capped:
                state.first_moment[rows] += logits.mul_(share).sum(1)

    def _finish_columns(self, weight: Tensor, start: int, stop: int, across: int) -> None:
        """wbar of a tile that all rows have met."""
        column_mass = self.state.column_mass[start:stop]
        share = column_mass / column_mass.sum().clamp(min=torch.finfo(column_mass.dtype).tiny)
        torch.mv(weight.T, share, out=self.state.mean_weight[across])
        bias = self.tiles.bias(start, stop)
        if bias is not None:
            self.state.mean_bias[across] = share @ bias

    def finish_rows(self, running: Running, lse: Tensor) -> None:
        """Close a block of rows."""
        rows, to_share = slice(running.first, running.last), (running.shift - lse).exp_()
        self.state.first_moment[rows] *= to_share
        self.state.total_mass[rows] *= to_share

    def finish(self) -> None:
        self.state.kind.copy_(torch.tensor(self.kind, dtype=torch.uint8))
        self.state.count.copy_(torch.tensor(self.count, dtype=torch.int32))


_BUDGET_OF_MEAN = 4
