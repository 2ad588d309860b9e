"""A weight matrix kept in factors, so that spherical losses train it at a cost without V in it.

    W = F U + 1 omega'        F (V, D), U (D, D) invertible, omega (D,)

An SGD step on W multiplies it from the right, adds one row to all its rows, and changes the rows of the targets. The
first goes into U, the second into omega, and only the third touches F. Beside the factors are kept, updated with them,
the mean row of W and the covariance of its rows: they give mean and variance of all scores of a hidden state.

Source: Vincent, de Brebisson and Bouthillier, arXiv 1412.7091 and arXiv 1606.08061. They keep Q = W'W; the covariance
`Q/V - mean_row mean_row'` has the same update with fewer terms, and keeps its digits where the rows share a large mean.
"""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the factored weight must be float32 or float64, got {weight.dtype}; use .float()")
        classes, size = weight.shape
        if classes < size:
            raise ValueError(
                f"a factored weight has at least as many classes as features, got {classes} classes and {size} "
                "features (the bias counts as one); use torch.nn.Linear for so few classes"
            )
        self.register_buffer("factor", weight)
        self.register_buffer("core", weight.new_zeros(size, core_width(size)))
        self.condition = Condition()
        self.reset_factors()
        self.refresh()

    @property
    def classes(self) -> int:
        return self.factor.shape[0]

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
        # Near the mean, so that it is not squared and then subtracted again.
        shift = self.rows(next(self.blocks())).mean(0)
        total = torch.zeros(self.size, dtype=torch.float64, device=self.core.device)
        gram = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.core.device)
        for rows in self.blocks():
            shifted = self.rows(rows) - shift
            total += shifted.sum(0, dtype=torch.float64)
            gram += shifted.T @ shifted
        total /= self.classes
        self.covariance.copy_(gram / self.classes - torch.outer(total, total))
        self.mean_row.copy_(shift + total)
        self.condition.unrefreshed = 0

    def blocks(self) -> Iterator[slice]:
        """Slices of the classes, of a bounded number of numbers each."""
        step = max(1, BLOCK_NUMBERS // self.size)
        for start in range(0, self.classes, step):
            yield slice(start, min(start + step, self.classes))

    def rows(self, classes: slice | Tensor) -> Tensor:
        """Rows of W."""
        return torch.addmm(self.offset, self.factor[classes], self.mixing)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """W (V, D)."""
        weight = torch.empty_like(self.factor)
        for rows in self.blocks():
            weight[rows] = self.rows(rows)
        return weight

    def scores(self, products: Tensor, classes: Tensor) -> Tensor:
        """Scores of the given classes. products: `hidden @ core`, classes: (n, K) -> (n, K)"""
        parts = split(products, self.size)
        scores = products.new_empty(classes.shape)
        for rows in self._row_blocks(classes):
            gathered = self.factor[classes[rows]]  # (., K, D)
            scores[rows] = torch.einsum("nkd,nd->nk", gathered, parts.mixed[rows])
        return scores + parts.offset[:, None]

    def weighted_rows(self, classes: Tensor, weights: Tensor) -> Tensor:
        """`sum_k weights_ik F[classes_ik]`. classes, weights: (n, K) -> (n, D)"""
        if classes.shape[1] == 1:
            return self.factor[classes[:, 0]] * weights
        return F.embedding_bag(classes, self.factor, mode="sum", per_sample_weights=weights)

    def add_to_rows(self, classes: Tensor, weights: Tensor, rows: Tensor) -> None:
        """`F[classes_ik] += weights_ik rows_i`, over all i and k. classes, weights: (n, K), rows: (n, D)"""
        for block in self._row_blocks(classes):
            changes = weights[block, :, None] * rows[block, None, :]
            self.factor.index_add_(0, classes[block].reshape(-1), changes.reshape(-1, self.size))

    def _row_blocks(self, classes: Tensor) -> Iterator[slice]:
        step = max(1, BLOCK_NUMBERS // max(1, classes.shape[1] * self.size))
        for start in range(0, classes.shape[0], step):
            yield slice(start, start + step)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(astuple(self.condition), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        shrink, growth, unchecked, unrefreshed = state.tolist()
        self.condition = Condition(shrink, growth, int(unchecked), int(unrefreshed))

    def misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What of a checkpoint has another shape than here, in words."""
        return [
            f"{prefix}{name} is {tuple(state_dict[prefix + name].shape)} in the checkpoint, {tuple(buffer.shape)} here"
            for name, buffer in self.named_buffers()
            if prefix + name in state_dict and state_dict[prefix + name].shape != buffer.shape
        ]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """As a module's, but of tensors that do not all fit, none is loaded."""
        wrong = self.misfits(state_dict, prefix)
        if wrong:
            errors.append(f"{'; '.join(wrong)}: make the head with the checkpoint's sizes. Nothing of it was loaded")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
