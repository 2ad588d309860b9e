"""A number token loss a number, not a digit: runs of digits in the labels, read with their place values.

Source: the class NumberLevelLoss of the package ntloss 0.3.2; the loss a digit is of arXiv 2411.02083.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.losses import register
from xhead.losses.number_tokens import NumberRows, NumberTokenConfig


@dataclass(frozen=True)
class NumberLevelConfig(NumberTokenConfig):
    """Options of `"ntl_number"`.

    `float_level=True` reads `12.34` as the one number 1234 (a point does not break a run, and does not count);
    otherwise as 12 and 34. `point_id` is the token of the point, by default that of `"."` in the tokenizer. Places
    beyond `max_number_length` digits count as the highest one.
    """

    float_level: bool = False
    point_id: int | None = None
    max_number_length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.numbers.values
        if not bool(((values >= 0) & (values <= 9) & (values == values.round())).all()):
            raise ValueError(
                f"ntl_number reads digits: values must be whole numbers from 0 to 9, got {values.unique().tolist()}; "
                "use digit_level=True, or ntl_was for tokens of several digits"
            )
        if not 1 <= self.max_number_length <= 38:
            raise ValueError(f"max_number_length must be from 1 to 38, got {self.max_number_length!r}")
        if self.float_level and self.point_id is None:
            point_id = None if self.tokenizer is None else self.tokenizer.get_vocab().get(".")
            if point_id is None:
                raise ValueError('float_level=True needs the token of ".": none is known, give point_id=')
            object.__setattr__(self, "point_id", point_id)

    def counted(self, labels: Tensor, row_mask: Tensor | None) -> Tensor:
        """(...) bool: the first digits of the numbers, which their loss stands at."""
        digits = super().counted(labels, row_mask)
        before = _shift(digits, 1) & ~self._begins(labels)
        if self.float_level:
            point = labels == self.point_id
            point = point if row_mask is None else point & row_mask
            before = before | (_shift(point, 1) & _shift(digits, 2))
        return digits & ~before

    def _begins(self, labels: Tensor) -> Tensor:
        _, position = self.numbers.positions(labels)
        return self.numbers.after_space.to(labels.device)[position]


@register(
    "ntl_number",
    NumberLevelConfig,
    ordered=True,
    formula="relative error of each whole number",
    statistics=(),
    source="ntloss, PyPI",
)
def number_level_rows(
    logits: Any,  # LazyLogits (..., V)
    labels: Tensor,  # (...)
    config: NumberLevelConfig,
) -> Tensor:
    """`|y - yhat| / (y + yhat + eps)` at the first digit of each number, `yhat = sum_t 10^e_t sum_j q_tj v_j`.

    A number is a run of digits in the labels, `e_t` the digits that follow t in it, eps the machine's. Runs end with
    the last dimension of `labels`; through a patched model, where labels come as one long row, with a label that is no
    digit or is ignored: the end of a sequence, in causal language models always.
    Other rows are 0.
    """
    first = config.counted(labels, logits.row_mask)
    rows = NumberRows(logits, labels, config)
    digit = rows.counted
    number = first.reshape(-1).cumsum(0) * digit  # 0: no digit
    place = digit.cumsum(0)
    last = place.new_zeros(len(place) + 1).scatter_reduce(0, number, place, "amax")
    exponent = (last[number] - place).clamp(0, config.max_number_length - 1)

    def read(digits: Tensor) -> Tensor:  # (n',) -> (N,)
        digits = rows.spread(digits).reshape(-1) * 10.0**exponent
        return digits.new_zeros(len(place) + 1).index_add(0, number, digits)[number]

    actual, predicted = read(rows.targets), read(rows.means)
    error = (actual - predicted).abs() / (actual + predicted + torch.finfo(actual.dtype).eps)
    loss = rows.spread(rows.reweighed(rows.take(error), 1.0))
    return torch.where(first, loss, torch.zeros_like(loss))


def _shift(mask: Tensor, by: int) -> Tensor:  # (..., T)
    """The mask as it was `by` positions before, False where there was none."""
    return F.pad(mask, (by, 0))[..., : mask.shape[-1]]
