"""A weight matrix kept in factors, so that spherical losses train it at a cost without V in it.

    W = F U + 1 omega'        F (V, D), U (D, D) invertible, omega (D,)

An SGD step on W multiplies it from the right, adds one row to all its rows, and changes the rows of the targets. The
first goes into U, the second into omega, and only the third touches F. Beside the factors are kept, updated with them,
the mean row of W and the covariance of its rows: they give mean and variance of all scores of a hidden state.

Source: Vincent, de Brebisson and Bouthillier, arXiv 1412.7091 and arXiv 1606.08061. They keep Q = W'W; the covariance
`Q/V - mean_row mean_row'` has the same update with fewer terms, and keeps its digits where the rows share a large mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xhead.retrieval import TopK, ranks, topk
from xhead.retrieval.topk import Order

if TYPE_CHECKING:
    from xhead.heads.spherical.step import RowGradients

BLOCK_NUMBERS = 2**20  # how many numbers a temporary of V or of K rows may hold


class Products(NamedTuple):
    """Products of hidden states (n, D) with the state: columns of one matrix."""

    covariance: Tensor  # (n, D) H C
    mixed: Tensor  # (n, D) H U'
    inverse: Tensor  # (n, D) H U^-1
    mean: Tensor  # (n,) the mean score
    offset: Tensor  # (n,) H omega


def split(products: Tensor, size: int) -> Products:
    """The columns of `hidden @ core` by name. products: (n, width), size: D"""
    covariance, mixed, inverse, last = products.split((size, size, size, products.shape[1] - 3 * size), dim=1)
    return Products(covariance, mixed, inverse, last[:, 0], last[:, 1])


def core_width(size: int) -> int:
    """3 D + 2 columns, and zeros up to a multiple of 16: unaligned rows make its products take nearly twice as long."""
    return -(-(3 * size + 2) // 16) * 16


@dataclass
class Condition:
    """What is known of U since its singular values were looked at, and how old the moments are.

    shrink, growth: logarithms of how much the least one may have shrunk and the largest may have grown.
    unchecked, unrefreshed: steps since they were looked at, and since the moments were computed from the factors.
    """

    shrink: float = 0.0
    growth: float = 0.0
    unchecked: int = 0
    unrefreshed: int = 0

    def checked(self) -> None:
        self.shrink, self.growth, self.unchecked = 0.0, 0.0, 0


class TargetRows(Protocol):
    """The rows of W that a batch's targets name. classes: (n, K)"""

    classes: Tensor

    def scores(self, hidden: Tensor, products: Tensor) -> Tensor:
        """`h_i . w_k` for the targets k of row i. hidden: (n, D), products: `hidden @ core` -> (n, K)"""
        ...

    def weighted(self, weights: Tensor) -> Tensor:
        """`sum_k weights_ik w_k` over the targets k of row i. weights: (n, K) -> (n, D)"""
        ...


class Place(NamedTuple):
    """Which rows of W are here: those of the classes from `start` to `stop - 1`."""

    rank: int
    processes: int
    start: int
    stop: int
    classes: int

    def __str__(self) -> str:
        here = f"classes {self.start} to {self.stop - 1}" if self.start < self.stop else "none"
        return f"{here} of {self.classes} classes (rank {self.rank} of {self.processes})"


class FactoredWeight(nn.Module):
    """The state. Its buffers are not parameters: no optimiser may hold them.

    `factor`: F (V, D). `core`: (D, width), the columns `[C | U' | U^-1 | mean_row | omega | 0]` side by side, so that
    one product with hidden states gives all that a step needs of them, and one product updates all of it.
    C is the covariance `1/V sum_k (w_k - mean_row)(w_k - mean_row)'`.

    weight: (V, D), contiguous, which becomes F itself and is changed by the steps.
    """

    factor: Tensor
    core: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._start(weight, len(weight))

    def _start(self, weight: Tensor, classes: int) -> None:
        with self.together():
            self._check(weight, classes)
        self.register_buffer("factor", weight)
        self.register_buffer("core", weight.new_zeros(weight.shape[1], core_width(weight.shape[1])))
        self.condition = Condition()
        self.reset_factors()
        self.refresh()

    @staticmethod
    def _check(weight: Tensor, classes: int) -> None:
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the factored weight must be float32 or float64, got {weight.dtype}; use .float()")
        size = weight.shape[1]
        if classes < size:
            raise ValueError(
                f"a factored weight has at least as many classes as features, got {classes} classes and {size} "
                "features (the bias counts as one); use torch.nn.Linear for so few classes"
            )

    def together(self) -> AbstractContextManager[None]:
        """Errors inside are raised in all processes that share the weight."""
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """The state by name."""
        return {"factor": self.factor, "core": self.core}

    @property
    def place(self) -> Place:
        return Place(0, 1, 0, len(self.factor), len(self.factor))

    @property
    def classes(self) -> int:
        """V."""
        return self.place.classes

    @property
    def size(self) -> int:
        return self.factor.shape[1]

    @property
    def covariance(self) -> Tensor:
        return self.core[:, : self.size]

    @property
    def mixing(self) -> Tensor:
        """U, a view."""
        return self.core[:, self.size : 2 * self.size].T

    @property
    def inverse(self) -> Tensor:
        return self.core[:, 2 * self.size : 3 * self.size]

    @property
    def mean_row(self) -> Tensor:
        return self.core[:, 3 * self.size]

    @property
    def offset(self) -> Tensor:
        """omega, a view."""
        return self.core[:, 3 * self.size + 1]

    @torch.no_grad()
    def reset_factors(self) -> None:
        """U = I and omega = 0; F is left as it is."""
        identity = torch.eye(self.size, dtype=self.core.dtype, device=self.core.device)
        self.mixing.copy_(identity)
        self.inverse.copy_(identity)
        self.offset.zero_()
        self.condition.checked()

    @torch.no_grad()
    def fold(self) -> None:
        """`F <- W`, U = I, omega = 0: O(V D^2)."""
        for rows in self.blocks():
            self.factor[rows] = self.rows(rows)
        self.reset_factors()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """`W <- factor W`."""
        # Factors near 1 are themselves rounded in float32, always to the same side; what they take away is not.
        self.covariance.add_(self.covariance, alpha=factor * factor - 1)
        for part in (self.mixing, self.mean_row, self.offset):
            part.add_(part, alpha=factor - 1)
        self.inverse.add_(self.inverse, alpha=1 / factor - 1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute `mean_row` and `covariance` from the factors again, O(V D^2), summed in float64."""
        double = {"dtype": torch.float64, "device": self.core.device}
        # Near the mean, so that it is not squared and then subtracted again.
        some = self.rows(next(self.blocks(), slice(0, 0))).double()
        shift = self._add_up(torch.cat([some.sum(0), torch.tensor([len(some)], **double)]))
        shift = (shift[:-1] / shift[-1]).to(self.core.dtype)
        sums = torch.zeros(1 + self.size, self.size, **double)
        for rows in self.blocks():
            shifted = self.rows(rows) - shift
            sums[0] += shifted.sum(0, dtype=torch.float64)
            sums[1:] += shifted.T @ shifted
        sums = self._add_up(sums) / self.classes
        self.covariance.copy_(sums[1:] - torch.outer(sums[0], sums[0]))
        self.mean_row.copy_(shift + sums[0])
        self.condition.unrefreshed = 0

    def _add_up(self, sums: Tensor) -> Tensor:
        """Sums over the rows that are here to sums over all of them."""
        return sums

    def blocks(self) -> Iterator[slice]:
        """Slices of the rows that are here, of a bounded number of numbers each."""
        step = max(1, BLOCK_NUMBERS // self.size)
        for start in range(0, len(self.factor), step):
            yield slice(start, start + step)

    def rows(self, places: slice | Tensor) -> Tensor:
        """Rows of W, of those that are here."""
        return torch.addmm(self.offset, self.factor[places], self.mixing)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """W (V, D)."""
        return self.own_rows()

    def own_rows(self) -> Tensor:
        """The rows of W that are here, those of the classes in `place`."""
        weight = torch.empty_like(self.factor)
        for rows in self.blocks():
            weight[rows] = self.rows(rows)
        return weight

    def target_rows(self, classes: Tensor) -> TargetRows:
        """Rows of W by class. classes: (n, K)"""
        return HeldRows(self, classes)

    def gathered(self, gradients: RowGradients | None) -> RowGradients | None:
        """The gradient from the rows of all processes, averaged over them."""
        return gradients

    def add_to_rows(self, classes: Tensor, weights: Tensor, rows: Tensor) -> None:
        """`F[classes_ik] += weights_ik rows_i`, over all i and k. classes, weights: (n, K), rows: (n, D)"""
        for block in row_blocks(classes, self.size):
            changes = weights[block, :, None] * rows[block, None, :]
            self.factor.index_add_(0, classes[block].reshape(-1), changes.reshape(-1, self.size))

    def topk(self, hidden: Tensor, k: int, order: Order, block: int) -> TopK:
        """As `xhead.retrieval.topk`, of W. hidden: (n, D)"""
        parts = split(hidden @ self.core, self.size)
        return topk(parts.mixed, self.factor, k, offset=parts.offset, order=order, block=block)

    def ranks(self, hidden: Tensor, target: Tensor, order: Order, ties: str, block: int) -> Tensor:
        """As `xhead.retrieval.ranks`, of W. hidden: (n, D), target: (n,)"""
        parts = split(hidden @ self.core, self.size)
        return ranks(parts.mixed, self.factor, target, offset=parts.offset, order=order, ties=ties, block=block)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([*astuple(self.condition), *self.place], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        shrink, growth, unchecked, unrefreshed = state[:4].tolist()
        self.condition = Condition(shrink, growth, int(unchecked), int(unrefreshed))

    def misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What of a checkpoint has another shape than here, or is of other classes, in words."""
        wrong = [
            f"{prefix}{name} is {tuple(state_dict[prefix + name].shape)} in the checkpoint, {tuple(tensor.shape)} here"
            for name, tensor in self.tensors().items()
            if prefix + name in state_dict and state_dict[prefix + name].shape != tensor.shape
        ]
        extra = state_dict.get(f"{prefix}_extra_state")
        there = self.place if extra is None else Place(*map(int, extra[4:].tolist()))
        if there != self.place and (not wrong or there.processes != 1 or self.place.processes != 1):
            wrong.append(f"the checkpoint holds {there}, here are {self.place}")
        return wrong

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """As a module's, but of tensors that do not all fit, none is loaded."""
        wrong = self.misfits(state_dict, prefix)
        if wrong:
            errors.append(f"{'; '.join(wrong)}: make the head as the checkpoint's was. Nothing of it was loaded")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)


class HeldRows:
    """Target rows of a weight that has them all."""

    def __init__(self, weight: FactoredWeight, classes: Tensor) -> None:
        self.weight, self.classes = weight, classes

    def scores(self, hidden: Tensor, products: Tensor) -> Tensor:
        parts = split(products, self.weight.size)
        scores = products.new_empty(self.classes.shape)
        for rows in row_blocks(self.classes, self.weight.size):
            gathered = self.weight.factor[self.classes[rows]]  # (., K, D)
            scores[rows] = torch.einsum("nkd,nd->nk", gathered, parts.mixed[rows])
        return scores + parts.offset[:, None]

    def weighted(self, weights: Tensor) -> Tensor:
        if self.classes.shape[1] == 1:
            factors = self.weight.factor[self.classes[:, 0]] * weights
        else:
            factors = F.embedding_bag(self.classes, self.weight.factor, mode="sum", per_sample_weights=weights)
        return torch.mm(factors, self.weight.mixing).addr_(weights.sum(1), self.weight.offset)


def row_blocks(classes: Tensor, size: int) -> Iterator[slice]:
    """Slices of the rows whose targets, times D, are a bounded number. classes: (n, K)"""
    step = max(1, BLOCK_NUMBERS // max(1, classes.shape[1] * size))
    for start in range(0, classes.shape[0], step):
        yield slice(start, start + step)
