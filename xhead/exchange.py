"""What processes that train one weight together tell each other. All of them make each call, in the same order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """A process group, with what is needed of it.

    group: a `torch.distributed.ProcessGroup` that this process belongs to; `torch.distributed.group.WORLD` is all.

    Raises RuntimeError where no process group was initialised, ValueError in a process outside of the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("process_group= needs torch.distributed.init_process_group(...) before it")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the process group: use it on the group's ranks alone")

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("what is shared by several processes cannot be pickled: save the state_dict() of every rank")

    def share(self, value: Any, error: Exception | None = None) -> list[Any]:
        """The values of all ranks, small ones. An error of any rank is raised on all."""
        mine = None if error is None else (_builtin(error), str(error))
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (value, mine), group=self.group)
        if error is not None:
            raise error
        for rank, (_, theirs) in enumerate(everyone):
            if theirs is not None:
                raise theirs[0](f"on rank {rank}: {theirs[1]}")
        return [each for each, _ in everyone]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises inside on any rank raises on all."""
        try:
            yield
        except Exception as error:
            self.share(None, error)
        else:
            self.share(None)

    def agree(self, tolerance: float = 0.0, **settings: Any) -> dict[str, Any]:
        """The first rank's settings. Raises ValueError on all where they differ, numbers by more than `tolerance`."""
        everyone = self.share(settings)
        for name, first in everyone[0].items():
            for rank, others in enumerate(everyone):
                other = others[name]
                near = isinstance(first, float) and math.isclose(first, other, rel_tol=tolerance)
                if not near and repr(first) != repr(other):
                    raise ValueError(
                        f"{name} must be the same on all ranks, got {first!r} on rank 0 and {other!r} on rank {rank}"
                    )
        return everyone[0]

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one after the other. rows: (counts[rank], ...) -> (sum(counts), ...)"""
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        if padded.numel():
            dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def own(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows of what `gather` gave."""
        start = sum(counts[: self.rank])
        return rows[start : start + counts[self.rank]]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, written into the tensor."""
        if tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor


def _builtin(error: Exception) -> type[Exception]:
    return next((kind for kind in (IndexError, TypeError, ValueError) if isinstance(error, kind)), RuntimeError)
