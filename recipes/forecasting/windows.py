"""Values as tokens: divided by the mean absolute value of the context, then put in uniform bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.common.errors import RecipeError
from recipes.forecasting.series import Series

MISSING = 0
IGNORED = -100


@dataclass(frozen=True)
class ValueTokens:
    """Token 0 is a missing value, token 1 + b the b-th of `bins` equal intervals from `low` to `high`."""

    bins: int
    low: float
    high: float

    @property
    def vocabulary(self) -> int:
        return self.bins + 1

    @property
    def token_range(self) -> tuple[int, int]:
        return 1, self.bins + 1

    def encode(self, scaled: Tensor) -> Tensor:
        """Tokens of scaled values; what lies outside the bins is put in the outermost."""
        place = ((scaled - self.low) / (self.high - self.low) * self.bins).floor().clamp(0, self.bins - 1)
        return torch.where(scaled.isnan(), MISSING, place.nan_to_num().long() + 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """The centres of the bins; NaN for a missing value."""
        centres = self.low + (tokens - 0.5) * (self.high - self.low) / self.bins
        return centres.masked_fill(tokens == MISSING, torch.nan)


class Windows(NamedTuple):
    """Stretches of the series, each a context and what followed."""

    tokens: Tensor  # (n, context + horizon)
    values: Tensor  # (n, context + horizon)
    scale: Tensor  # (n,)


def cut(pieces: list[np.ndarray], starts: list[np.ndarray], context: int, horizon: int, tokens: ValueTokens) -> Windows:
    """The windows that start at these places of each piece; those without a value in their context are left out."""
    size = context + horizon
    found = [piece[start : start + size] for piece, places in zip(pieces, starts, strict=True) for start in places]
    values = torch.from_numpy(np.stack(found)).double()
    scale = values[:, :context].abs().nanmean(-1)
    kept = scale.isfinite() & (scale > 0)
    values, scale = values[kept], scale[kept]
    return Windows(tokens.encode(values / scale[:, None]), values, scale)


def split(
    series: Series, context: int, horizon: int, tokens: ValueTokens, train_windows: int, test_windows: int
) -> tuple[Windows, Windows]:
    """Training windows from the first four fifths of each series, test windows spread over the rest.

    Raises:
        RecipeError: the series are too short for one window each.
    """
    size = context + horizon
    early, late = [], []
    for name, values in series.values.items():
        border = len(values) * 4 // 5
        if border < size or len(values) - border < size:
            raise RecipeError(
                f"the series {name} has {len(values)} values; --context {context} and --horizon {horizon} need "
                f"{5 * size} or more: a fifth is for testing"
            )
        early.append(values[:border])
        late.append(values[border:])
    rng = np.random.default_rng(0)
    shares = [each.tolist() for each in np.array_split(np.arange(train_windows), len(early))]
    starts = [rng.integers(0, len(p) - size + 1, len(share)) for p, share in zip(early, shares, strict=True)]
    each = -(-test_windows // len(late))
    spread = [np.linspace(0, len(piece) - size, each).astype(int) for piece in late]
    return cut(early, starts, context, horizon, tokens), cut(late, spread, context, horizon, tokens)


class TokenRows(torch.utils.data.Dataset):
    """The training windows as the Trainer wants them: the model shifts the labels itself."""

    def __init__(self, windows: Windows) -> None:
        self.tokens = windows.tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "labels": row.masked_fill(row == MISSING, IGNORED)}
