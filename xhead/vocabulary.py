"""`Vocabulary`: which rows of a classifier this process holds, where a group of processes shares them.

All processes of the group have the same rows of hidden states and the same labels, and compute the same loss. Two rules
make every gradient right, with one collective a direction:

* What all processes have (hidden states) enters the part that each computes for its own classes through `enter`: the
  gradient that comes out of it is that of a process's own classes, and is summed over the group there, once.
* What they find is joined by `gather`. From there on all compute the same again, so that a process's own part of the
  gradient needs no communication.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


class Vocabulary:
    """The classes `[start, stop)` of `classes` are this process's, the others belong to other processes of the group.

    Args:
        classes: V, of the whole weight.
        start, stop: the rows of the weight (V, D) that this process holds, as a tensor (stop - start, D). Shards may be
            uneven, and empty; in any order of the processes, each row has to be held by exactly one.
        group: a process group; None is the default one.

    It is made by all processes of the group together: they tell each other their ranges here.

    Raises ValueError, in every process alike, for ranges that overlap or leave a gap, and for different `classes`.
    """

    def __init__(self, classes: int, start: int, stop: int, group: Any = None):
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, (classes, start, stop), group=group)
        _check_ranges(told)
        self._set(classes, [(start, stop) for _, start, stop in told], group)

    @classmethod
    def even(cls, classes: int, group: Any = None) -> "Vocabulary":
        """Ranges as equal as can be, in the order of the ranks. The processes tell each other nothing here.

        All of them have to give the same `classes`; the last ones hold nothing where these are fewer than processes.
        """
        shards = even_shards(classes, dist.get_world_size(group))
        return cls._of(classes, _consecutive(shards), group)

    @classmethod
    def _of(cls, classes: int, ranges: list[tuple[int, int]], group: Any) -> "Vocabulary":
        """Ranges that all processes know already."""
        vocabulary = object.__new__(cls)
        vocabulary._set(classes, ranges, group)
        return vocabulary

    def _set(self, classes: int, ranges: list[tuple[int, int]], group: Any) -> None:
        self.classes, self.ranges, self.group = classes, ranges, group
        self.rank = dist.get_rank(group)
        self.start, self.stop = ranges[self.rank]
        self._agreed: set[str] = set()

    def __repr__(self) -> str:
        return f"Vocabulary(classes={self.classes}, start={self.start}, stop={self.stop}, rank={self.rank})"

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.ranges)

    @property
    def own(self) -> slice:
        """The classes of this process."""
        return slice(self.start, self.stop)

    def holds(self, classes: Tensor) -> Tensor:
        """Which of the classes are this process's: bool, shaped as `classes`."""
        return (classes >= self.start) & (classes < self.stop)

    def place(self, classes: Tensor) -> Tensor:
        """The rows of the own shard that belong to the classes; some row of it for a class that is not held."""
        return (classes - self.start).clamp(0, max(self.stop - self.start - 1, 0))

    def narrow(self, start: int, stop: int) -> "Vocabulary":
        """The same processes sharing the classes `[start, stop)` alone."""
        ranges = [(min(max(a, start), stop) - start, min(max(b, start), stop) - start) for a, b in self.ranges]
        return self._like(stop - start, ranges)

    def select(self, chosen: Tensor) -> "Vocabulary":
        """The same processes sharing some classes alone, ascending and the same in all. chosen: (m,)"""
        edges = torch.tensor(self.ranges, device=chosen.device)
        ranges = torch.searchsorted(chosen, edges).tolist()
        return self._like(chosen.shape[0], [(a, b) for a, b in ranges])

    def _like(self, classes: int, ranges: list[tuple[int, int]]) -> "Vocabulary":
        other = self._of(classes, ranges, self.group)
        other._agreed = self._agreed
        return other

    def agree(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, asked: str) -> None:
        """Make sure that all processes ask the same of the same kind of operands, the first time that this one does.

        Raises RuntimeError, in every process alike, where they do not.
        """
        rows = self.stop - self.start
        fit = weight.shape[:1] == (rows,) and (bias is None or bias.shape == (rows,))
        kind = (
            f"{asked}; hidden of {hidden.dtype}{' with' if hidden.requires_grad else ' without'} gradient, weight "
            f"(..., {weight.shape[-1]}) of {weight.dtype}, bias of {getattr(bias, 'dtype', None)}"
            f"{'' if fit else '; weight or bias do not have the rows of their classes'}"
        )
        self.exchange(kind, f", hidden {tuple(hidden.shape)}")
        if not fit:
            raise RuntimeError(
                f"weight and bias must be the {rows} rows of the classes [{self.start}, {self.stop}), got weight "
                f"{tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)}"
            )

    def exchange(self, kind: str, detail: str = "") -> None:
        """Tell all processes, the first time this kind comes up; RuntimeError in all of them if one says another."""
        if kind in self._agreed:
            return
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, kind + detail, group=self.group)
        if len(set(told)) > 1:
            said = "".join(f"\n  rank {rank}: {each}" for rank, each in enumerate(told))
            raise RuntimeError(
                "processes that share a vocabulary must compute the same loss of the same batch, with the same options "
                f"and dtypes, and they differ:{said}"
            )
        self._agreed.add(kind)

    # What passes between the processes.

    def enter(self, shared: Tensor) -> Tensor:
        """The same tensor, for this process's own classes: its gradient is summed over the group.

        A DTensor becomes the whole local tensor: one that is split along its rows is gathered, and its gradient
        reduce-scattered.
        """
        if isinstance(shared, DTensor):
            mesh = shared.device_mesh
            if mesh.ndim != 1 or mesh.size() != self.size:
                raise TypeError(
                    f"a DTensor must be on the mesh of the {self.size} processes that share the vocabulary, got one on "
                    f"a mesh of shape {tuple(mesh.shape)}"
                )
            return shared.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return _Enter.apply(shared, self.group)  # type: ignore[return-value]

    def leave(self, entered: Tensor) -> Tensor:
        """What came from `enter`, for what all processes compute alike: their gradients are not added up again."""
        return _Leave.apply(entered, self.size)  # type: ignore[return-value]

    def gather(self, own: Tensor) -> Tensor:
        """What each process has found, of one shape (K,), in the order of the ranks: (R, K)."""
        return _Gather.apply(own, self)  # type: ignore[return-value]

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the processes of what each has found."""
        return _Sum.apply(own, self.group)  # type: ignore[return-value]

    def whole(self, rows: Tensor) -> Tensor:
        """All rows, gathered: (stop - start, ...) -> (V, ...). For what all processes compute alike."""
        return _Whole.apply(rows, self)  # type: ignore[return-value]

    def gather_rows(self, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The batch, of which each process has made some rows: (n_r, ...) -> (sum n_r, ...), in the order of the ranks.

        For what all processes compute alike, such as a loss over the shared classes: the gradient of the batch is whole
        there, and each process takes that of its own rows.

        counts: `n_r` of every process, which they tell each other where it is left out. They may differ, and be 0.
        """
        if counts is None:
            told = torch.tensor([own.shape[0]], device=own.device)
            counts = _all_gather(told, self).tolist()
        return _Whole.apply(own, self._of(sum(counts), _consecutive(counts), self.group))  # type: ignore[return-value]


def even_shards(classes: int, processes: int) -> list[int]:
    """How many classes each process has: as equal as can be."""
    return [classes // processes + (rank < classes % processes) for rank in range(processes)]


def _consecutive(counts: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *accumulate(counts)]))


def of_dtensor(weight: DTensor) -> Vocabulary | None:
    """How a weight is split over processes, where it is along its rows and over one mesh dimension; otherwise None."""
    mesh = weight.device_mesh
    if mesh.ndim != 1 or type(weight.placements[0]) is not Shard or weight.placements[0].dim != 0:
        return None
    group, classes = mesh.get_group(), weight.shape[0]
    if (group, classes) not in _of_groups:
        # As torch.chunk: shards of one size along the mesh, of which the last ones may be smaller or empty.
        step, along = -(-classes // mesh.size()), mesh.mesh.flatten().tolist()
        places = [along.index(rank) for rank in dist.get_process_group_ranks(group)]
        ranges = [(min(place * step, classes), min((place + 1) * step, classes)) for place in places]
        _of_groups[group, classes] = Vocabulary._of(classes, ranges, group)
    return _of_groups[group, classes]


_of_groups: dict[tuple[Any, int], Vocabulary] = {}
"""Kept, since each remembers what its processes have agreed on."""


def own_rows(
    weight: Tensor, bias: Tensor | None, vocabulary: Vocabulary | None
) -> tuple[Tensor, Tensor | None, Vocabulary | None]:
    """Weight and bias as this process's own rows, and how these are shared.

    Raises TypeError for a DTensor that is not split along its rows, and for one with a vocabulary beside it.
    """
    if isinstance(weight, DTensor):
        if vocabulary is not None:
            raise TypeError("a weight that is a DTensor says itself how it is split: leave vocabulary out")
        vocabulary = of_dtensor(weight)
        if vocabulary is None:
            raise TypeError(
                f"a weight that is a DTensor must be split along its rows over one mesh dimension, got "
                f"{weight.placements} on a mesh of shape {tuple(weight.device_mesh.shape)}; redistribute it to "
                "[Shard(0)], or give weight.full_tensor()"
            )
        weight = weight.to_local()
    if isinstance(bias, DTensor):
        split = isinstance(bias.placements[0], Shard)
        bias = bias.to_local() if split or vocabulary is None else vocabulary.enter(bias)[vocabulary.own]
    return weight, bias, vocabulary


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entered: Tensor, size: int) -> Tensor:
        ctx.size = size
        return entered.view_as(entered)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / ctx.size, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.rank = vocabulary.rank
        return _all_gather(own, vocabulary).view(vocabulary.size, own.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][ctx.rank], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.own = vocabulary.own
        longest = max(stop - start for start, stop in vocabulary.ranges)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        together = _all_gather(padded, vocabulary)
        whole = rows.new_empty(vocabulary.classes, *rows.shape[1:])
        for part, (start, stop) in zip(together.split(longest), vocabulary.ranges, strict=True):
            whole[start:stop] = part[: stop - start]
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][ctx.own], None


def _all_gather(own: Tensor, vocabulary: Vocabulary) -> Tensor:
    """What each process has, of one shape, one after another along the first dimension."""
    together = own.new_empty(vocabulary.size * own.shape[0], *own.shape[1:])
    # The newer name is that of torch 2.13, which warns of the older one.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(together, own.contiguous(), group=vocabulary.group)
    return together


def _check_ranges(told: Sequence[tuple[Any, Any, Any]]) -> None:
    shards = ", ".join(f"rank {rank} [{start}, {stop})" for rank, (_, start, stop) in enumerate(told))
    known = {classes for classes, _, _ in told}
    if len(known) > 1:
        raise ValueError(f"the processes must agree on the number of classes, got {sorted(map(str, known))}: {shards}")
    classes = told[0][0]
    if not all(isinstance(number, int) for each in told for number in each):
        raise ValueError(f"classes, start and stop must be whole numbers, got {list(told)}")
    reached = 0
    for _, start, stop in sorted(told, key=lambda each: each[1:]):
        if not 0 <= start <= stop <= classes:
            raise ValueError(f"a range must lie within the {classes} classes, got [{start}, {stop}) in {shards}")
        if start == stop:
            continue
        if start != reached:
            problem = f"[{reached}, {start}) belongs to no process" if start > reached else f"{start} belongs to two"
            raise ValueError(f"the shards of {classes} classes must meet without gap or overlap, {problem}: {shards}")
        reached = stop
    if reached != classes:
        raise ValueError(
            f"the shards of {classes} classes must meet without gap or overlap, [{reached}, {classes}) belongs to no "
            f"process: {shards}"
        )
