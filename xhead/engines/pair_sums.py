"""For each entry p of a row's column set, `sum_{k not in the set} softplus(o_k - o_p)`, and the derivative of it.

A tile is formed once and met with one entry of every row after another, so that the cost grows with the largest set.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from xhead.engines.problem import Problem
from xhead.engines.row_functions import Processes, gradients, tiles_of, times_cap_slope
from xhead.engines.summands import SUMMANDS
from xhead.engines.tiles import Tiles

_SOFTPLUS = SUMMANDS["softplus"]


class _Entries:
    """The entries of the sets: the first of every row, then the second of those that have one, and so on."""

    def __init__(self, tiles: Tiles, column_logits: Tensor, offsets: Tensor):
        """column_logits: (E,), offsets: (N + 1,)"""
        self.tiles, self.logits, self.offsets, self.count = tiles, column_logits, offsets, offsets.diff()
        self._rounds: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def rounds(self, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
        """For q = 0, 1, ...: the rows of first to last that have a q-th entry, and which entry it is."""
        found = self._rounds.get((first, last))
        if found is None:
            count, offsets = self.count[first:last], self.offsets[first:last]
            found = []
            for q in range(int(count.max())):
                row = (count > q).nonzero().squeeze(1)
                found.append((row, offsets[row] + q))
            self._rounds[first, last] = found
        return found

    def differences(self, logits: Tensor, first: int, last: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(row, entry, `o_k - o_p`) of a round each; -inf for the classes of the set. logits: (n, c), changed"""
        logits[self.tiles.set_in(first, last, start)] = float("-inf")
        for row, entry in self.rounds(first, last):
            yield row, entry, logits[row] - self.logits[entry, None]


class _Residuals:
    """Of a tile: `sum_p g_p sigmoid(o_k - o_p)`, 0 for the classes of the set."""

    def __init__(self, tiles: Tiles, column_logits: Tensor, offsets: Tensor, grad: Tensor):
        self.tiles, self.grad = tiles, grad
        self.entries = _Entries(tiles, column_logits, offsets)

    def tile(self, logits: Tensor, first: int, last: int, start: int) -> Tensor:
        out = self.tiles.scratch(logits).zero_()
        for row, entry, difference in self.entries.differences(logits, first, last, start):
            out.index_add_(0, row, _SOFTPLUS.slope(difference).mul_(self.grad[entry, None]))
        # Where the residual is 0 the slope of the cap must be a number, whatever it is.
        logits[self.tiles.set_in(first, last, start)] = 0.0
        return times_cap_slope(out, logits, self.tiles.problem.softcap)


@dataclass(frozen=True)
class PairSums:
    """(E,): the sums of each entry of the sets."""

    def forward(self, problem: Problem, processes: Processes) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The sums, and for the backward `o_p` and the sums' derivative for it with the sign changed."""
        tiles, logits_of_sets = tiles_of(problem), processes.column_logits(problem)
        entries = _Entries(tiles, logits_of_sets, processes.offsets)
        found = logits_of_sets.new_zeros(2, *logits_of_sets.shape)
        sums, slopes = found
        for first, last in tiles.row_blocks():
            hidden = tiles.rows.hidden(first, last)
            for start, stop in tiles.class_blocks():
                logits = tiles.logits(hidden, tiles.weight(start, stop), start)
                for _, entry, difference in entries.differences(logits, first, last, start):
                    sums[entry] += _SOFTPLUS.value(difference).sum(1)
                    slopes[entry] += _SOFTPLUS.slope(difference).sum(1)
        sums, slopes = processes.sum(found)
        return (sums,), (logits_of_sets, slopes)

    def backward(
        self,
        problem: Problem,
        processes: Processes,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tiles = tiles_of(problem)
        (logits_of_sets, slopes), (grad,) = saved, grads
        residuals = _Residuals(tiles, logits_of_sets, processes.offsets, grad)
        return gradients(tiles, residuals, -(grad * slopes)[processes.held], needs)
