"""A factored weight over several processes: each has some rows of F, and all have the rest of the state.

Hidden states, targets and loss stay with the process they come from, as under data parallelism. Between the processes
go, for the n rows of a step with K targets each, the rows of W that the targets name (n K D numbers) in the forward
pass, and the rows' gradients (n (2 D + 2 K + 2)) in the backward pass: nothing with V in it. With these every process
makes the same update of C, U, U^-1, omega and the mean row, and that of its own rows of F.

Two processes whose arithmetic differs may come to other U and F with the same W: nothing but rows of W and what
follows from them, such as C, is exchanged or compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xhead.exchange import Exchange
from xhead.heads.spherical.factored import FactoredWeight, Place, split
from xhead.heads.spherical.step import RowGradients
from xhead.retrieval import TopK, topk
from xhead.retrieval.topk import Order, check_ranks, count_before, place_of


class ShardedWeight(FactoredWeight):
    """The part of a factored weight that one process has. Its methods are called in all processes, in one order.

    Its tensors are buffers only while they are saved, loaded or moved: DistributedDataParallel would overwrite every
    process's rows with those of the first.

    rows: the rows of W of this process, contiguous. shards: how many classes each process has, in order.
    """

    def __init__(self, rows: Tensor, exchange: Exchange, shards: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.exchange, self.shards = exchange, tuple(shards)
        self._start(rows, sum(shards))
        self._hide()

    def _hide(self) -> None:
        for name in ("factor", "core"):
            self.__dict__[name] = self._buffers.pop(name)

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        self._buffers.update(self.tensors())
        try:
            yield
        finally:
            self._hide()

    def _apply(self, *arguments, **named):
        with self._as_buffers():
            return super()._apply(*arguments, **named)

    def _save_to_state_dict(self, *arguments, **named):
        with self._as_buffers():
            super()._save_to_state_dict(*arguments, **named)

    def _load_from_state_dict(self, *arguments, **named):
        with self._as_buffers():
            super()._load_from_state_dict(*arguments, **named)

    @property
    def place(self) -> Place:
        rank = self.exchange.rank
        start = sum(self.shards[:rank])
        return Place(rank, self.exchange.size, start, start + self.shards[rank], sum(self.shards))

    def together(self) -> AbstractContextManager[None]:
        return self.exchange.together()

    def _add_up(self, sums: Tensor) -> Tensor:
        return self.exchange.add_up(sums)

    def dense(self) -> Tensor:
        return self.exchange.gather(self.own_rows(), self.shards)

    def _held(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Which classes are here, and the places of those in F. (...) -> (...) bool, (m,)"""
        place = self.place
        here = (classes >= place.start) & (classes < place.stop)
        return here, classes[here] - place.start

    @torch.no_grad()
    def target_rows(self, classes: Tensor) -> FetchedRows:
        counts, widths = zip(*self.exchange.share(tuple(classes.shape)), strict=True)
        padded = F.pad(classes, (0, max(widths) - classes.shape[1]))
        everyone = self.exchange.gather(padded, counts)
        here, places = self._held(everyone)
        rows = self.core.new_zeros(*everyone.shape, self.size)
        rows[here] = self.rows(places)
        mine = self.exchange.own(self.exchange.add_up(rows), counts)[:, : classes.shape[1]]
        return FetchedRows(classes, mine.clone())  # not a view, which would keep those of all processes

    @torch.no_grad()
    def gathered(self, gradients: RowGradients | None) -> RowGradients | None:
        shape = (0, 1) if gradients is None else tuple(gradients.classes.shape)
        counts, widths = zip(*self.exchange.share(shape), strict=True)
        if not any(counts):
            return None
        width = max(widths)
        classes = torch.zeros(shape[0], width, dtype=torch.int64, device=self.core.device)
        packed = self.core.new_zeros(shape[0], 2 * self.size + width + 2)
        if gradients is not None:
            gamma = F.pad(gradients.gamma, (0, width - shape[1]))
            columns = [gradients.hidden, gradients.centred, gamma, gradients.variance[:, None], gradients.mean[:, None]]
            torch.cat(columns, 1, out=packed)
            classes[:, : shape[1]] = gradients.classes
        classes, packed = self.exchange.gather(classes, counts), self.exchange.gather(packed, counts)
        hidden, rest = packed.tensor_split([self.size], 1)
        hidden, rest = hidden.contiguous(), rest / self.exchange.size
        centred, gamma, variance, mean = rest.split([self.size, width, 1, 1], 1)
        return RowGradients(hidden, hidden @ self.core, centred, classes, gamma, variance[:, 0], mean[:, 0])

    def add_to_rows(self, classes: Tensor, weights: Tensor, rows: Tensor) -> None:
        here, places = self._held(classes)
        super().add_to_rows(places[:, None], weights[here][:, None], rows[here.nonzero()[:, 0]])

    def topk(self, hidden: Tensor, k: int, order: Order, block: int) -> TopK:
        with self.together():
            if not 1 <= k <= self.classes:
                raise ValueError(f"k must be from 1 to the number of classes, {self.classes}, got {k}")
        self.exchange.agree(k=k)
        counts = self.exchange.share(len(hidden))
        everyone = self.exchange.gather(hidden, counts)
        shape = (len(everyone), k)
        scores, classes = everyone.new_full(shape, -torch.inf), torch.full(shape, -1, device=everyone.device)
        held = min(k, len(self.factor))
        with self.together():
            if held:
                parts = split(everyone @ self.core, self.size)
                best = topk(parts.mixed, self.factor, held, offset=parts.offset, order=order, block=block)
                scores[:, :held], classes[:, :held] = best.scores, best.classes + self.place.start
        scores, classes = (self._candidates(each, counts) for each in (scores, classes))
        keys = order(scores).masked_fill(classes < 0, -torch.inf)
        chosen = keys.topk(k, dim=1).indices
        return TopK(scores.gather(1, chosen), classes.gather(1, chosen))

    def _candidates(self, found: Tensor, counts: Sequence[int]) -> Tensor:
        """What all processes found for this one's rows. found: (sum(counts), k) -> (n, processes * k)"""
        processes = self.exchange.size
        every = self.exchange.gather(found, [len(found)] * processes).reshape(processes, *found.shape)
        return self.exchange.own(every.transpose(0, 1), counts).flatten(1)

    def ranks(self, hidden: Tensor, target: Tensor, order: Order, ties: str, block: int) -> Tensor:
        with self.together():
            check_ranks(hidden, target, self.classes, ties)
        counts = self.exchange.share(len(hidden))
        everyone, targets = self.exchange.gather(hidden, counts), self.exchange.gather(target.long(), counts)
        parts = split(everyone @ self.core, self.size)
        here, places = self._held(targets)
        own = parts.offset.new_zeros(len(everyone))
        own[here] = (parts.mixed[here] * self.factor[places]).sum(1) + parts.offset[here]
        own = order(self.exchange.add_up(own))
        with self.together():
            before = count_before(
                parts.mixed, self.factor, own, targets - self.place.start,
                offset=parts.offset, order=order, block=block,
            )  # fmt: skip
        above, equal = (self.exchange.own(self.exchange.add_up(each), counts) for each in before)
        return place_of(above, equal, ties)


class FetchedRows:
    """Target rows of W that came from the processes that have them. rows: (n, K, D)"""

    def __init__(self, classes: Tensor, rows: Tensor) -> None:
        self.classes, self._rows = classes, rows

    def scores(self, hidden: Tensor, products: Tensor) -> Tensor:
        return torch.einsum("nkd,nd->nk", self._rows, hidden)

    def weighted(self, weights: Tensor) -> Tensor:
        return torch.einsum("nkd,nk->nd", self._rows, weights)
