"""Logits times one number a row, as the logits of scaled hidden states."""

from typing import Any

import torch
from torch import Tensor

from xhead.factors import Factors
from xhead.lazy import LazyLogits


class RowScaled:
    """`factor_i o_i` for factors that may be asked for one after another: a bias is joined to the weight once.

    Raises ValueError for logits that are not linear in the hidden states (a softcap).
    """

    def __init__(self, bound: Any, loss: str):  # LazyLogits (n, V), its weight at hand
        canonical = bound._at_hand()
        if canonical.softcap is not None:
            raise ValueError(
                f"{loss} needs logits that are linear in the hidden states, got softcap={canonical.softcap}, which "
                "bounds them already; turn the model's softcap off, or use another loss"
            )
        factors = bound._factors()
        self.hidden, weight, self.scale = canonical.hidden, factors.weight, canonical.scale
        self.row_mask, self._record = bound.row_mask, bound._record
        if canonical.bias is not None:
            self.hidden = torch.cat([self.hidden, torch.ones_like(self.hidden[..., :1])], -1)
            weight = torch.cat([weight, canonical.bias[:, None].to(weight.dtype)], 1)
        self._factors = Factors(weight, None, factors.vocabulary, factors.joined)
        self.classes = self._factors.out_features

    def times(self, factor: Tensor, rows: Tensor | None = None) -> LazyLogits:
        """factor: (n,) -> logits (n, V); with rows, indices (m,), of those alone: factor (m,) -> (m, V)."""
        hidden, mask = self.hidden, self.row_mask
        if rows is not None:
            hidden, mask = hidden[rows], None if mask is None else mask[rows]
        vocabulary = self._factors.vocabulary
        if vocabulary is not None:
            factor = vocabulary.enter(factor)
        scaled = LazyLogits.deferred(hidden * factor[..., None].to(hidden.dtype), self._factors, self._record)
        scaled._row_mask = mask
        return scaled if self.scale == 1 else scaled * self.scale
