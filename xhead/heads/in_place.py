"""A vector a label, trained by SGD inside the backward: a block's gradient is used up before the next one is made.

Optimiser state and gradient of a classifier are each as large as the classifier. Here there is neither: beyond the
weight, memory is that of one block's gradient. In bfloat16 with stochastic rounding the weight itself is halved.

Source: plain SGD for the classifier and the fused update as in Renee (MLSys 2023) and ELMO (ICML 2025).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xhead.engines.problem import Problem, Results
from xhead.lazy import LazyLogits
from xhead.losses.config import check_number
from xhead.sharded import merge, of_no_classes
from xhead.statistics import Statistics, compressed_columns
from xhead.vocabulary import Vocabulary


class InPlaceClassifier(nn.Module):
    """Logits `o_k = h . w_k`; a backward pass takes the step `w_k <- (1 - lr weight_decay) w_k - lr dloss/dw_k`.

    The weight is a buffer: no optimiser sees it and it has no `.grad`. Every backward is a step, so there is no
    accumulation over batches, no gradient clipping and no loss scaling for it, and the loss's own scale counts.

    Args:
        labels, size: the weight is (L, D), 0 at the start.
        lr: may be changed between steps.
        dtype: of the weight. In torch.bfloat16, the hidden states and a block's gradient are rounded to it, and the
            step is rounded up or down at random, so that steps below the weight's precision count on average.
        block: labels whose gradient exists at a time.
        adaptive: divide a label's step by the root of the sum, over all steps, of its mean squared gradient: row-wise
            Adagrad, a number a label. Rare labels then learn as fast as frequent ones.
        reduce: called with each block's gradient before the step, to change it in place: to sum it over processes that
            hold the same weight, for instance.
        vocabulary: processes share the labels; the weight is this process's range of them, which may be empty. Hidden
            states and labels of the loss are those of the whole batch, the same in all processes, as
            `vocabulary.gather_rows` makes them; then every step is that of one process with all labels.

    Raises ValueError for options that are not allowed.
    """

    weight: Tensor
    squares: Tensor | None

    def __init__(
        self,
        labels: int,
        size: int,
        *,
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        block: int = 16384,
        adaptive: bool = False,
        reduce: Callable[[Tensor], None] | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__()
        check_number("lr", lr, 0.0)
        check_number("weight_decay", weight_decay, 0.0)
        if dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float64, torch.float32 or torch.bfloat16, got {dtype}")
        if min(labels, size, block) < 1:
            raise ValueError(f"labels, size and block must be at least 1, got {labels}, {size} and {block}")
        if vocabulary is not None and labels != vocabulary.classes:
            raise ValueError(f"labels must be those of the vocabulary, {vocabulary.classes}, got {labels}")
        self.lr, self.weight_decay, self.block, self.reduce = lr, weight_decay, block, reduce
        self.vocabulary = vocabulary
        held = labels if vocabulary is None else vocabulary.stop - vocabulary.start
        self.register_buffer("weight", torch.zeros(held, size, dtype=dtype))
        squares = torch.zeros(held, dtype=torch.promote_types(dtype, torch.float32))
        self.register_buffer("squares", squares if adaptive else None)

    def forward(self, hidden: Tensor) -> "BlockLogits":
        """(n, D) -> (n, L), not computed yet."""
        leaves = []
        for start in range(0, max(self.weight.shape[0], 1), self.block):
            # `.data`: autograd must not take the step of one block for a change of what another has saved.
            leaf = self.weight.data[start : start + self.block]
            if self.training and torch.is_grad_enabled():
                leaf.requires_grad_().register_post_accumulate_grad_hook(partial(self._step, start))
            leaves.append(leaf)
        if self.vocabulary is not None:
            hidden = self.vocabulary.enter(hidden)
        return BlockLogits(hidden, tuple(leaves), vocabulary=self.vocabulary)

    @torch.no_grad()
    def _step(self, start: int, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if self.reduce is not None:
            self.reduce(gradient)
        if self.squares is not None:
            squares = self.squares[start : start + leaf.shape[0]]
            squares += gradient.to(squares.dtype).square().mean(1)
            gradient.div_(squares.sqrt().clamp(min=torch.finfo(squares.dtype).tiny)[:, None])
        if leaf.dtype == torch.bfloat16:
            stepped = leaf.float().mul_(1 - self.lr * self.weight_decay).add_(gradient.float(), alpha=-self.lr)
            leaf.data.copy_(stochastically_rounded(stepped))
        else:
            leaf.data.mul_(1 - self.lr * self.weight_decay).add_(gradient, alpha=-self.lr)


def stochastically_rounded(values: Tensor) -> Tensor:
    """bfloat16, one of the two neighbours of each value, at random so that the mean is the value. values: float32"""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class BlockLogits:
    """Logits (n, L) whose weight comes in blocks of labels; it answers the losses' questions as `LazyLogits` does.

    Statistics: `lse`, `complement_lse`, `column_logits`, `pointwise_sum` and `target`. Their losses are `cce` and the
    others of the target's probability, `infonce`, `decoupled_softmax`, `sigmoid` and `asymmetric`.
    """

    def __init__(
        self,
        hidden: Tensor,
        blocks: tuple[Tensor, ...],
        scale: float = 1.0,
        vocabulary: Vocabulary | None = None,
    ):
        """vocabulary: the blocks are this process's labels, and `hidden` is what its `enter` gave."""
        self.hidden, self.blocks, self.scale, self.vocabulary = hidden, blocks, scale, vocabulary
        self.device = hidden.device
        labels = sum(block.shape[0] for block in blocks) if vocabulary is None else vocabulary.classes
        self.shape = torch.Size((hidden.shape[0], labels))

    def __mul__(self, factor: float) -> "BlockLogits":
        return BlockLogits(self.hidden, self.blocks, self.scale * factor, self.vocabulary)

    def __truediv__(self, divisor: float) -> "BlockLogits":
        return self * (1 / divisor)

    def statistics(
        self,
        *names: str,
        target: Tensor | None = None,  # (n,)
        columns: Tensor | None = None,  # (n, K), -1 for none, or sparse CSR (n, L)
        mean_weight: None = None,
        **options: Any,
    ) -> Statistics:
        """As `LazyLogits.statistics`. Raises ValueError for a statistic that cannot be put together from blocks."""
        unknown = [name for name in names if name not in _JOINED]
        if unknown or mean_weight is not None:
            raise ValueError(
                f"a classifier that steps in the backward has no {', '.join(unknown) or 'mean_weight'}: it can give "
                f"{', '.join(_JOINED)}; take a loss of these, or a weight that an optimiser trains"
            )
        sets = None if columns is None else compressed_columns(columns, self.shape[:1], self.shape[1])
        entries = None if sets is None else sets[1]
        if self.vocabulary is None:
            return Statistics(**self._own(names, target, sets, options))
        asked = ", ".join(f"{name}={value}" for name, value in sorted(options.items()))
        self.vocabulary.exchange(
            f"in-place classifier: {', '.join(names)}; scale={self.scale}, {asked}; hidden of {self.hidden.dtype}",
            f", hidden {tuple(self.hidden.shape)}",
        )
        own = self._own(names, target, sets, options)
        dtype = next(iter(own.values())).dtype
        return Statistics(**merge(own, names, self.vocabulary, self.shape[0], target, entries, dtype=dtype))

    def _own(
        self,
        names: tuple[str, ...],
        target: Tensor | None,
        sets: tuple[Tensor, Tensor] | None,
        options: dict[str, Any],
    ) -> Results:
        """Of the labels held here; what belongs to others is 0."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        start = 0 if self.vocabulary is None else self.vocabulary.start
        for block in self.blocks:
            stop = start + block.shape[0]
            asked = dict(options)
            if sets is not None:
                inside, asked["columns"] = _columns_within(*sets, start, stop)
            if target is not None:
                here = (target >= start) & (target < stop)
                asked["target"] = torch.where(here, target - start, 0)
            # A cast for each block, so that the gradients of all blocks are summed in the dtype of hidden.
            hidden = self.hidden.to(block.dtype)
            if start < stop:
                statistics = LazyLogits(hidden, block, scale=self.scale).statistics(*names, **asked)
            else:
                statistics = Statistics(**of_no_classes(Problem(hidden, block, names)))
            for name in names:
                value = getattr(statistics, name)
                if name == "target":
                    value = torch.where(here, value, 0.0)
                elif name == "column_logits":
                    assert sets is not None
                    value = value.new_zeros(sets[1].shape).index_copy(0, inside, value)
                found[name].append(value)
            start = stop
        return {name: _JOINED[name](values) for name, values in found.items()}


def _columns_within(offsets: Tensor, column: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which entries of the sets are labels start to stop, (e,), and these as columns of their own, (n, K)."""
    row = torch.repeat_interleave(torch.arange(offsets.shape[0] - 1, device=column.device), offsets.diff())
    inside = ((column >= start) & (column < stop)).nonzero().squeeze(1)
    row, column = row[inside], column[inside] - start
    count = torch.bincount(row, minlength=offsets.shape[0] - 1)
    place = torch.arange(row.shape[0], device=row.device) - (count.cumsum(0) - count)[row]
    columns = column.new_full((count.shape[0], int(count.max()) if row.numel() else 0), -1)
    columns[row, place] = column
    return inside, columns


def _log_sum(values: list[Tensor]) -> Tensor:
    stacked = torch.stack(values)
    empty = (stacked == float("-inf")).all(0)
    # The gradient of logsumexp over nothing is NaN, so an empty row takes a constant of its own.
    return torch.where(empty, float("-inf"), torch.where(empty, 0.0, stacked).logsumexp(0))


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0)


_JOINED = {
    "lse": _log_sum,
    "complement_lse": _log_sum,
    "pointwise_sum": _sum,
    "target": _sum,
    "column_logits": _sum,
}
