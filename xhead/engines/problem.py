"""What an engine is asked: the inputs, the statistics wanted and how the gradient may be filtered."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

STREAMED = ("lse", "entropy", "expectation", "max", "argmax", "complement_lse", "pointwise_sum")
"""Statistics that need every logit of a row once."""

CLOSED = ("target", "mean", "variance", "subset_lse", "column_logits")
"""Statistics that need no pass over all the logits, as long as these are linear in the hidden state."""

STATISTICS = STREAMED + CLOSED
SCALARS = tuple(name for name in STATISTICS if name not in ("expectation", "argmax", "column_logits"))


class FilterOptions(NamedTuple):
    """Which entries of the softmax the gradient may leave out, and what stands in for them."""

    threshold: float = 0.0  # entries with p below it are not multiplied out; 0 keeps all
    compensate: bool = True
    hidden_grad: bool = True
    weight_grad: bool = True


@dataclass(frozen=True)
class Problem:
    """Logits `o = cap(scale * (hidden @ weight.T + bias))`, and the row statistics wanted of them."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    names: tuple[str, ...]
    bias: Tensor | None = None  # (V,)
    target: Tensor | None = None  # (N,) class indices, or (N, V) probabilities
    values: Tensor | None = None  # (V, M)
    row_offsets: Tensor | None = None  # (N + 1,), with `columns` the sets of columns in compressed-row form
    columns: Tensor | None = None  # (sum of the sets' sizes,)
    mean_weight: Tensor | None = None  # (V,)
    pointwise: str | None = None  # the name in `summands.SUMMANDS` of what `pointwise_sum` adds up
    pointwise_parameters: tuple[float, ...] = ()
    row_mask: Tensor | None = None  # (N,) rows that count; the others' statistics are 0
    scale: float = 1.0
    softcap: float | None = None
    transform: Callable[[Tensor], Tensor] | None = None  # of the capped logits (N, V)
    filter: FilterOptions = FilterOptions()

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """float64 stays float64; everything else is accumulated in float32."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def soft_target(self) -> bool:
        return self.target is not None and self.target.ndim == 2

    @property
    def closed_names(self) -> tuple[str, ...]:
        """The names that this problem can have without a pass over its logits."""
        closed = []
        for name in self.names:
            linear = name in ("mean", "variance") and self.softcap is None
            gathered = name in ("subset_lse", "column_logits") or (name == "target" and not self.soft_target)
            if linear or gathered:
                closed.append(name)
        return tuple(closed)

    @property
    def other_names(self) -> tuple[str, ...]:
        """The names that are left to the closed forms where others need a pass over the logits.

        A target that is one class a row is streamed with those: next to its own softmax entry the two gradients cancel
        exactly, which they would not when rounded apart.
        """
        return tuple(name for name in self.closed_names if name != "target")

    @property
    def streamed_names(self) -> tuple[str, ...]:
        """The names that a pass over the logits gives."""
        return tuple(name for name in self.names if name not in self.other_names)

    def having(self, names: tuple[str, ...]) -> "Problem":
        return replace(self, names=names)


Results = dict[str, Tensor]
"""Statistic name -> (N,); (N, M) for `expectation`, (sum of the sets' sizes,) for `column_logits`."""


def column_rows(row_offsets: Tensor) -> Tensor:
    """Row index of each entry of a compressed-row set.

    row_offsets: (N + 1,) -> (sum of sizes,)
    """
    rows = torch.arange(row_offsets.shape[0] - 1, device=row_offsets.device)
    return torch.repeat_interleave(rows, row_offsets.diff())


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cap_slope(capped: Tensor, softcap: float | None) -> Tensor | float:
    """Derivative of the cap, from its result: `1 - (capped / softcap)^2`."""
    return 1.0 if softcap is None else 1 - (capped / softcap).square()
