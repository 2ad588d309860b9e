"""Rows and classes cut into tiles, the logits of one tile, and the running statistics of a block of rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from xhead.engines.gram import blocks, inverse
from xhead.engines.problem import Problem, column_rows
from xhead.engines.summands import SUMMANDS

RULED_OUT = -1e18  # stands for a logit of -inf where it is multiplied with a probability of 0


def tile_shape(device: torch.device, *, filtered: bool) -> tuple[int, int]:
    """Rows and classes of a tile: small enough for the cache, large enough for a full-speed GEMM.

    A filtered gradient wants few classes a tile, since what is alike in them is what it rests on.
    """
    if device.type != "cpu":
        return 2048, 8192
    return (1024, 256) if filtered else (1024, 512)


class Rows:
    """The rows that count, in their order; per-row tensors are compacted once, hidden states a block at a time."""

    def __init__(self, problem: Problem):
        self.problem = problem
        mask = problem.row_mask
        self.index = None if mask is None or bool(mask.all()) else mask.nonzero().squeeze(1)
        self.count = problem.rows if self.index is None else self.index.shape[0]

    def take(self, vector: Tensor) -> Tensor:
        """vector: (N, ...) -> (n, ...)"""
        return vector if self.index is None else vector[self.index]

    def hidden(self, start: int, stop: int) -> Tensor:
        """Hidden states of the counted rows start to stop, in the accumulation dtype: (stop - start, D)."""
        hidden = self.problem.hidden
        block = hidden[start:stop] if self.index is None else hidden[self.index[start:stop]]
        return block.to(self.problem.accumulate_dtype)

    def spread(self, vector: Tensor) -> Tensor:
        """vector: (n, ...) -> (N, ...), 0 in the rows that do not count."""
        if self.index is None:
            return vector
        full = vector.new_zeros(self.problem.rows, *vector.shape[1:])
        return full.index_copy_(0, self.index, vector)

    def columns(self) -> tuple[Tensor, Tensor] | None:
        """The counted rows' sets of columns, as (row among the counted, column)."""
        problem = self.problem
        if problem.row_offsets is None or problem.columns is None:
            return None
        row, column = column_rows(problem.row_offsets), problem.columns
        if problem.row_mask is None or self.index is None:
            return row, column
        counted = problem.row_mask[row]
        position = problem.row_mask.cumsum(0) - 1
        return position[row[counted]], column[counted]


class Tiles:
    """Logits of one tile at a time, in buffers that are used again.

    With an `order`, class positions 0 to V stand for the classes `order[0]` to `order[V - 1]`.
    """

    def __init__(self, problem: Problem, rows: Rows, order: Tensor | None = None):
        self.problem, self.rows = problem, rows
        self.shape = tile_shape(problem.hidden.device, filtered=order is not None)
        self._buffers: list[Tensor | None] = [None, None, None]
        sets = rows.columns()
        self.set_row, self.set_column = (None, None) if sets is None else sets
        self.order = order
        self._sets: dict[tuple[int, int], tuple[Tensor, Tensor, list[int]]] = {}
        self._targets: dict[tuple[int, int], tuple[Tensor, Tensor, list[int]]] = {}
        self.target = None if problem.target is None else self.rows.take(problem.target)
        if order is not None and self.target is not None:
            self.target = inverse(order)[self.target].long()

    def row_blocks(self) -> Iterator[tuple[int, int]]:
        return blocks(self.rows.count, size=self.shape[0])

    def class_blocks(self) -> Iterator[tuple[int, int]]:
        return blocks(self.problem.vocabulary, size=self.shape[1])

    def classes(self, start: int, stop: int) -> slice | Tensor:
        """What indexes the classes at positions start to stop in a tensor over the classes."""
        return slice(start, stop) if self.order is None else self.order[start:stop]

    def bias(self, start: int, stop: int) -> Tensor | None:
        """(stop - start,) in the accumulation dtype."""
        bias = self.problem.bias
        return None if bias is None else bias[self.classes(start, stop)].to(self.problem.accumulate_dtype)

    def weight(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) in the accumulation dtype; a copy where there is an order."""
        return self.problem.weight[self.classes(start, stop)].to(self.problem.accumulate_dtype)

    def logits(self, hidden: Tensor, weight: Tensor, start: int) -> Tensor:
        """`cap(scale * (hidden @ weight.T + bias))`, valid until the next call.

        hidden: (n, D), weight: (c, D), the classes from `start` on -> (n, c)
        """
        problem = self.problem
        out = self._buffer(0, hidden.shape[0], weight.shape[0])
        bias = self.bias(start, start + weight.shape[0])
        if bias is None:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.addmm(bias, hidden, weight.T, out=out)
        if problem.scale != 1.0:
            out.mul_(problem.scale)
        return out if problem.softcap is None else out.div_(problem.softcap).tanh_().mul_(problem.softcap)

    def scratch(self, like: Tensor, which: int = 1) -> Tensor:
        """A second buffer (`which` 1) of a tile's shape or a third (2), valid until the next call."""
        return self._buffer(which, *like.shape)

    def release(self) -> None:
        """Give the buffers' memory back."""
        self._buffers = [None, None, None]

    def _buffer(self, which: int, height: int, width: int) -> Tensor:
        # Made when first needed: a backward that replays what the forward saved never forms a tile.
        buffer = self._buffers[which]
        if buffer is None or buffer.numel() < height * width:
            problem = self.problem
            buffer = torch.empty(height * width, dtype=problem.accumulate_dtype, device=problem.hidden.device)
            self._buffers[which] = buffer
        return buffer[: height * width].view(height, width)

    def targets_in(self, first: int, last: int, start: int) -> tuple[Tensor, Tensor]:
        """The rows of first to last whose target is in the tile from class `start` on, and where: (row, column)."""
        found = self._targets.get((first, last))
        if found is None:
            assert self.target is not None
            position, row = self.target[first:last].sort()
            found = self._targets[first, last] = position, row, self._edges(position)
        return self._inside(found, start)

    def set_in(self, first: int, last: int, start: int) -> tuple[Tensor, Tensor]:
        """The entries of the rows' column sets in the tile from class `start` on, as (row, column) within it."""
        found = self._sets.get((first, last))
        if found is None:
            assert self.set_row is not None and self.set_column is not None
            bounds = torch.tensor([first, last], device=self.set_row.device)
            begin, end = torch.searchsorted(self.set_row, bounds).tolist()
            position, order = self.set_column[begin:end].sort()
            found = self._sets[first, last] = position, self.set_row[begin:end][order] - first, self._edges(position)
        return self._inside(found, start)

    def _edges(self, position: Tensor) -> list[int]:
        """Where each block of classes begins among sorted class positions, and where the last one ends."""
        edges = torch.arange(0, self.problem.vocabulary + self.shape[1], self.shape[1], device=position.device)
        return torch.searchsorted(position, edges).tolist()

    def _inside(self, found: tuple[Tensor, Tensor, list[int]], start: int) -> tuple[Tensor, Tensor]:
        position, row, edges = found
        begin, end = edges[start // self.shape[1]], edges[start // self.shape[1] + 1]
        return row[begin:end], position[begin:end] - start


_OF_SOFTMAX = {"lse", "entropy", "expectation", "max", "argmax"}


class Running:
    """Statistics of a block of rows as its tiles go by: each is merged with what came before and can be again."""

    def __init__(self, tiles: Tiles, first: int, last: int):
        self.tiles, self.first, self.last = tiles, first, last
        problem = tiles.problem
        self.names = problem.names
        self.softmax_wanted = bool(_OF_SOFTMAX & set(self.names))
        count = last - first
        new = torch.zeros(count, dtype=problem.accumulate_dtype, device=problem.hidden.device)
        self.shift = torch.full_like(new, float("-inf"))
        self.total, self.weighted, self.target = new, new.clone(), new.clone()
        self.argmax = torch.zeros(count, dtype=torch.int64, device=new.device)
        self.mean, self.weighted_mean, self.deviation = new.clone(), new.clone(), new.clone()
        self.complement = (torch.full_like(new, float("-inf")), new.clone())
        self.pointwise = new.clone()
        self.seen = 0
        self.moment = None
        if problem.values is not None:
            self.moment = new.new_zeros(count, problem.values.shape[1])

    def update(self, logits: Tensor, exponentials: Tensor, start: int) -> Tensor:
        """Take in a tile's logits (n, c) and leave `exp(logits - shift)` in `exponentials` if a statistic needs them.

        Returns the factor (n,) from the shift before to this one.
        """
        problem, stop = self.tiles.problem, start + logits.shape[1]
        rescale = self._update_softmax(logits, exponentials, start) if self.softmax_wanted else self.total
        if problem.target is not None:
            self._update_target(logits, start, stop)
        if "mean" in self.names or "variance" in self.names:
            self._update_moments(logits, start, stop)
        if "complement_lse" in self.names:
            self._update_complement(logits, start)
        if "pointwise_sum" in self.names:
            assert problem.pointwise is not None
            self.pointwise += SUMMANDS[problem.pointwise].value(logits, *problem.pointwise_parameters).sum(1)
        return rescale

    def _update_softmax(self, logits: Tensor, exponentials: Tensor, start: int) -> Tensor:
        if "argmax" in self.names:
            largest, position = logits.max(1)
            self.argmax = torch.where(largest > self.shift, position + start, self.argmax)
        else:
            largest = logits.amax(1)
        shift = torch.maximum(self.shift, largest)
        # A row of -inf only must not become NaN through -inf - (-inf).
        base = shift.clamp(min=torch.finfo(shift.dtype).min)
        rescale = (self.shift - base).exp_()
        torch.sub(logits, base[:, None], out=exponentials).exp_()
        previous, before, self.shift = self.shift, self.total, shift
        self.total = self.total * rescale + exponentials.sum(1)
        if "entropy" in self.names:
            # Relative to the shift, so that the entropy does not come out as a difference of large logits.
            moved = (previous - base).clamp(min=RULED_OUT)
            relative = (logits - base[:, None]).clamp_(min=RULED_OUT)
            self.weighted = (self.weighted + moved * before) * rescale + (exponentials * relative).sum(1)
        if self.moment is not None:
            values = self.tiles.problem.values
            assert values is not None
            in_tile = values[start : start + logits.shape[1]].to(logits.dtype)
            self.moment = self.moment * rescale[:, None] + exponentials @ in_tile
        return rescale

    def _update_target(self, logits: Tensor, start: int, stop: int) -> None:
        target = self.tiles.target
        assert target is not None
        if target.ndim == 2:
            # A product rather than 0 * inf where a class without probability has an infinite logit is not meant.
            self.target += (logits * target[self.first : self.last, start:stop].to(logits.dtype)).sum(1)
            return
        row, column = self.tiles.targets_in(self.first, self.last, start)
        self.target[row] = logits[row, column]

    def _update_moments(self, logits: Tensor, start: int, stop: int) -> None:
        """Chan's merge of two sets' mean and sum of squared deviations."""
        mean_weight, count = self.tiles.problem.mean_weight, stop - start
        if mean_weight is not None:
            self.weighted_mean += logits @ mean_weight[start:stop].to(logits.dtype)
        mean = logits.mean(1)
        deviation = (logits - mean[:, None]).square_().sum(1)
        difference, together = mean - self.mean, self.seen + count
        self.deviation = self.deviation + deviation + difference.square() * (self.seen * count / together)
        self.mean = self.mean + difference * (count / together)
        self.seen = together

    def _update_complement(self, logits: Tensor, start: int) -> None:
        # Put back below: a copy of the tile would cost more than the few entries.
        place = self.tiles.set_in(self.first, self.last, start)
        inside = logits[place]
        logits[place] = float("-inf")
        shift, total = self.complement
        new_shift = torch.maximum(shift, logits.amax(1))
        base = new_shift.clamp(min=torch.finfo(shift.dtype).min)
        exponentials = torch.sub(logits, base[:, None], out=self.tiles.scratch(logits, 2)).exp_()
        self.complement = (new_shift, total * (shift - base).exp() + exponentials.sum(1))
        logits[place] = inside

    def results(self) -> dict[str, Tensor]:
        """Everything that was taken in, whether asked for or needed by the gradient: statistic -> (n,)."""
        problem = self.tiles.problem
        lse = _log_sum(self.shift, self.total)
        found = {"lse": lse, "max": self.shift, "argmax": self.argmax}
        if problem.target is not None:
            found["target"] = self.target
        if "entropy" in self.names:
            found["entropy"] = self.total.log() - self.weighted / self.total
        if self.moment is not None:
            found["expectation"] = self.moment / self.total[:, None]
        if "mean" in self.names:
            mean_weight = problem.mean_weight
            found["mean"] = self.mean if mean_weight is None else self.weighted_mean / mean_weight.sum()
        if "mean" in self.names or "variance" in self.names:
            found["uniform_mean"] = self.mean
            found["variance"] = self.deviation / max(self.seen, 1)
        if "complement_lse" in self.names:
            found["complement_lse"] = _log_sum(*self.complement)
        if "pointwise_sum" in self.names:
            found["pointwise_sum"] = self.pointwise
        return found


def _log_sum(shift: Tensor, total: Tensor) -> Tensor:
    return total.log() + shift.clamp(min=torch.finfo(shift.dtype).min)
