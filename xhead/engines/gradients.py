"""Accumulators of the gradients, and what a tile adds to them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.problem import Problem


class Gradients(NamedTuple):
    """Gradients of hidden, weight and bias, whole or of some rows and classes; None where one is not wanted."""

    hidden: Tensor | None  # (n, D)
    weight: Tensor | None  # (c, D)
    bias: Tensor | None  # (c,)

    @classmethod
    def for_rows(cls, problem: Problem, count: int, needs: tuple[bool, bool, bool]) -> "Gradients":
        """Whole gradients for `count` rows: hidden 0, weight and bias not filled yet."""
        options = {"dtype": problem.accumulate_dtype, "device": problem.hidden.device}
        return cls(
            torch.zeros(count, problem.hidden.shape[1], **options) if needs[0] else None,
            torch.empty_like(problem.weight, memory_format=torch.contiguous_format) if needs[1] else None,
            torch.empty(problem.vocabulary, **options) if needs[2] else None,
        )

    def of_rows(self, first: int, last: int) -> "Gradients":
        return self._replace(hidden=None if self.hidden is None else self.hidden[first:last])

    def of_classes(self, start: int, stop: int, dtype: torch.dtype) -> "Gradients":
        """Accumulators of classes start to stop in `dtype`, not filled yet: the gradient itself where it is of `dtype`.

        What is not the gradient itself gets there by `put_classes`.
        """
        weight = None if self.weight is None else self.weight[start:stop]
        if weight is not None and weight.dtype != dtype:
            weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        return self._replace(weight=weight, bias=None if self.bias is None else self.bias[start:stop])

    def zeros_of_classes(self, like: Tensor) -> "Gradients":
        """Accumulators of some classes, filled with 0. like: (c, D), their weight"""
        weight = None if self.weight is None else torch.zeros_like(like)
        return self._replace(weight=weight, bias=None if self.bias is None else torch.zeros_like(like[:, 0]))

    def put_classes(self, part: "Gradients", classes: slice | Tensor) -> None:
        """part: what `of_classes` or `zeros_of_classes` gave for these classes"""
        for whole, piece in ((self.weight, part.weight), (self.bias, part.bias)):
            if whole is not None and piece is not None and not _same_memory(whole, piece, classes):
                whole[classes] = piece.to(whole.dtype)

    def side(self, *, hidden: bool, weight: bool) -> "Gradients":
        """The accumulators of the sides that are True; the bias goes with the weight."""
        return Gradients(
            self.hidden if hidden else None, self.weight if weight else None, self.bias if weight else None
        )

    def any(self) -> bool:
        """Whether anything is wanted."""
        return any(accumulator is not None for accumulator in self)

    def clear_classes(self) -> None:
        """Fill the accumulators of the classes with 0."""
        for accumulator in (self.weight, self.bias):
            if accumulator is not None:
                accumulator.zero_()

    def rows_of_classes(self, classes: Tensor) -> "Gradients":
        """Copies of what some classes hold. classes: (c,)"""
        return Gradients(
            None,
            None if self.weight is None else self.weight[classes],
            None if self.bias is None else self.bias[classes],
        )

    def add_rows(self, classes: Tensor, rows: "Gradients") -> None:
        """Add what `rows_of_classes` gave. classes: (c,)"""
        for accumulator, piece in ((self.weight, rows.weight), (self.bias, rows.bias)):
            if accumulator is not None and piece is not None:
                accumulator.index_add_(0, classes, piece.to(accumulator.dtype))

    def add(self, residual: Tensor, hidden: Tensor, weight: Tensor, scale: float, *, fresh: bool = False) -> None:
        """Add a tile. residual: (n, c), hidden: (n, D), weight: (c, D); fresh: the classes' side is not filled yet."""
        if self.hidden is not None:
            self.hidden.addmm_(residual, weight, alpha=scale)
        if self.weight is not None:
            self.weight.addmm_(residual.T, hidden, alpha=scale, beta=0.0 if fresh else 1.0)
        if self.bias is not None:
            if fresh:
                self.bias.zero_()
            self.bias.add_(residual.sum(0), alpha=scale)


def _same_memory(whole: Tensor, piece: Tensor, classes: slice | Tensor) -> bool:
    return isinstance(classes, slice) and piece.data_ptr() == whole[classes].data_ptr()


def add_weighted_rows(out: Tensor, position: Tensor, source: Tensor, value: Tensor, table: Tensor) -> None:
    """`out[position] += value * table[source]`, summed over repeats in the dtype of value.

    out: (n, D), table: (c, D), of any dtypes; position, source, value: (E,)
    """
    dtype = value.dtype
    position, order = position.sort()
    source, value = source[order], value[order]
    position, count = position.unique_consecutive(return_counts=True)
    ends = count.cumsum(0)
    starts = ends - count
    in_place = table.dtype == dtype and table.is_contiguous()
    for first, last in blocks(position.shape[0], size=_BAGS):
        begin, end = int(starts[first]), int(ends[last - 1])
        if in_place:
            bags = (starts[first:last] - begin).to(source.dtype)
            total = F.embedding_bag(source[begin:end], table, bags, mode="sum", per_sample_weights=value[begin:end])
        else:
            bag = torch.repeat_interleave(torch.arange(last - first, device=out.device), count[first:last])
            total = torch.zeros(last - first, out.shape[1], dtype=dtype, device=out.device)
            for low, high in blocks(end, begin):
                rows = table[source[low:high]].to(dtype).mul_(value[low:high, None])
                total.index_add_(0, bag[low - begin : high - begin], rows)
        out.index_add_(0, position[first:last], total.to(out.dtype))


_BAGS = 64  # summed at a time, so that the sums take little memory
