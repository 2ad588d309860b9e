"""Number token losses: how far off, as a number, the predicted digits are.

With number tokens j = 1..J of value `v_j` and `q = softmax` over the J number logits alone, a row whose label is the
number token of value y has one of the losses

    ntl_was     sum_j q_j |y - v_j|            the Wasserstein-1 distance to the label
    ntl_mse     |y - sum_j q_j v_j|^p          with p = 2, the squared error of the mean
    ntl_mae     the same with p = 1

and any other row has 0, with no gradient. They say nothing about the tokens that are no numbers: add them to
cross-entropy, `xhead.patch(model, loss="cce+0.3*ntl_was", tokenizer=tokenizer)`.

Source: arXiv 2411.02083, with `lambda = 0.3`; `reweigh` and `squash_factor` as in the package ntloss 0.3.2, where they
were added. ntl_mse and ntl_mae can vanish at a wrong prediction (half on 0, half on 8, for a 4); ntl_was cannot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xhead.lazy import LazyLogits
from xhead.losses import get_loss, register
from xhead.losses.config import FilterConfig
from xhead.losses.number_vocabulary import NumberTokens, from_lists, number_tokens
from xhead.statistics import Statistics


@dataclass(frozen=True)
class NumberTokenConfig(FilterConfig):
    """What the number tokens are, and options that all number token losses share.

    Either `tokenizer`, with `digit_level` and `space_prefixed` as in `number_tokens`, or `token_ids` and `values`.

    `reweigh=True` makes a row's loss l into `m l + 1.01 d (1 - m)`: m is the probability of all number tokens under the
    softmax over all classes, d the largest loss that a number token could have. Where a number is due, it draws
    probability to the numbers; it takes the lse of the row, which cross-entropy has computed already in a sum.
    """

    tokenizer: Any = None
    token_ids: Sequence[int] | None = None
    values: Sequence[float] | None = None
    digit_level: bool = True
    space_prefixed: bool = False
    reweigh: bool = False
    numbers: NumberTokens = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = self.token_ids is not None or self.values is not None
        if listed == (self.tokenizer is not None) or (self.token_ids is None) != (self.values is None):
            raise ValueError(
                "a number token loss needs either tokenizer= or both token_ids= and values=, got "
                f"tokenizer={type(self.tokenizer).__name__}, token_ids={self.token_ids!r}, values={self.values!r}"
            )
        if self.token_ids is not None and self.values is not None:
            numbers = from_lists(self.token_ids, self.values)
        else:
            numbers = number_tokens(self.tokenizer, self.digit_level, self.space_prefixed)
        object.__setattr__(self, "numbers", numbers)

    def counted(self, labels: Tensor, row_mask: Tensor | None) -> Tensor:
        """(...) bool: the rows that have a loss."""
        found, _ = self.numbers.positions(labels)
        return found if row_mask is None else found & row_mask


@dataclass(frozen=True)
class WassersteinConfig(NumberTokenConfig):
    """Options of `"ntl_was"`.

    `squash_factor=f` makes a distance d that is not 0 into `1 + (d - dmin) (f - 1) / (dmax - dmin)`, with dmin and
    dmax the smallest and the largest between number tokens of different values: the farthest token is then f times as
    far as the nearest. For values that lie unevenly, such as those of multi-digit tokens.
    """

    squash_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.squash_factor is not None:
            if not self.squash_factor > 1:
                raise ValueError(f"squash_factor must be a number above 1, or None, got {self.squash_factor!r}")
            if self.numbers.largest_distance <= self.numbers.smallest_distance:
                raise ValueError(
                    "squash_factor needs number tokens of three values or more, got the values "
                    f"{self.numbers.values.tolist()}; leave it out"
                )

    def squash(self, distances: Tensor) -> Tensor:
        if self.squash_factor is None:
            return distances
        smallest, largest = self.numbers.smallest_distance, self.numbers.largest_distance
        slope = (self.squash_factor - 1) / (largest - smallest)
        return torch.where(distances == 0, distances, 1 + (distances - smallest) * slope)

    @property
    def largest_loss(self) -> float:
        return self.numbers.largest_distance if self.squash_factor is None else self.squash_factor


@dataclass(frozen=True)
class MeanConfig(NumberTokenConfig):
    """Options of `"ntl_mse"`: `p`, the exponent of the error of the mean."""

    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.p >= 1:
            raise ValueError(f"p must be a number of at least 1, got {self.p!r}")

    @property
    def largest_loss(self) -> float:
        return self.numbers.largest_distance**self.p


@dataclass(frozen=True)
class AbsoluteMeanConfig(MeanConfig):
    """Options of `"ntl_mae"`."""

    p: float = 1.0


@register(
    "ntl_was",
    WassersteinConfig,
    formula="sum_j q_j |v_y - v_j| over number tokens, q their softmax",
    statistics=(),
    source="arXiv 2411.02083",
)
def wasserstein_rows(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: WassersteinConfig,
) -> Tensor:
    """`sum_j q_j d(y, v_j)` of the rows whose label is a number token, `d(y, v) = |y - v|` or squashed; 0 elsewhere."""
    rows = NumberRows(logits, labels, config)
    distances = config.squash((rows.targets[:, None] - rows.values).abs())
    return rows.spread(rows.reweighed((rows.probabilities * distances).sum(-1), config.largest_loss))


@register(
    "ntl_mae",
    AbsoluteMeanConfig,
    formula="|v_y - sum_j q_j v_j|",
    statistics=(),
    source="arXiv 2411.02083",
)
@register(
    "ntl_mse",
    MeanConfig,
    formula="(v_y - sum_j q_j v_j)^2",
    statistics=(),
    source="arXiv 2411.02083",
)
def mean_rows(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: MeanConfig,
) -> Tensor:
    """`|y - sum_j q_j v_j|^p` of the rows whose label is a number token; 0 elsewhere."""
    rows = NumberRows(logits, labels, config)
    return rows.spread(rows.reweighed((rows.targets - rows.means).abs().pow(config.p), config.largest_loss))


def number_token_loss(
    logits: Any,  # (..., V), a tensor or LazyLogits
    labels: Tensor,  # (...)
    loss: str = "ntl_was",
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """A number token loss by name, averaged over the positions that it counts: those whose label is a number token.

    Args:
        logits: those that predict `labels`, position by position: for a causal model shift them first,
            `logits[:, :-1]` and `labels[:, 1:]`. `xhead.LazyLogits(hidden, weight)` saves building them.
        loss: `"ntl_was"`, `"ntl_mse"`, `"ntl_mae"` or `"ntl_number"`.
        reduction: `"mean"` over the positions that count (over the numbers for `"ntl_number"`), 0 where there are none;
            `"sum"`; or `"none"`, shaped as `labels`.
        options: those of the loss, such as `tokenizer=`.

    Raises ValueError for an unknown loss, reduction or option value, and for labels of another shape than the logits.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    chosen = get_loss(loss, **options)
    config = getattr(chosen, "config", None)
    if not isinstance(config, NumberTokenConfig):
        raise ValueError(f"{loss!r} is no number token loss; add losses where the model is patched, or one by one")
    labels = labels.to(logits.device)
    # No token has a negative id.
    labels = labels.masked_fill(labels == ignore_index, -1)
    rows = chosen(logits if isinstance(logits, LazyLogits) else DenseLogits(logits), labels)
    if reduction == "none":
        return rows
    return rows.sum() / config.counted(labels, None).sum().clamp(min=1) if reduction == "mean" else rows.sum()


class DenseLogits:
    """Logits that have been built, asked as lazy ones are."""

    row_mask = None

    def __init__(self, logits: Tensor):  # (..., V)
        self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.shape = logits.shape

    def reshape(self, *shape: int) -> "DenseLogits":
        return DenseLogits(self._logits.reshape(*shape))

    def __getitem__(self, rows: Tensor) -> "DenseLogits":
        return DenseLogits(self._logits[rows])

    def class_logits(self, classes: Tensor) -> Tensor:
        return self._logits[..., classes.to(self._logits.device)]

    def statistics(self, name: str, **options: Any) -> Statistics:
        return Statistics(**{name: self._logits.logsumexp(-1)})


class NumberRows:
    """The rows whose label is a number token, n' of N, and what they predict over the J number tokens."""

    def __init__(
        self,
        logits: Any,  # (..., V)
        labels: Tensor,  # (...)
        config: NumberTokenConfig,
    ):
        numbers, classes = config.numbers, logits.shape[-1]
        if numbers.last_id >= classes:
            raise ValueError(
                f"the number token {numbers.last_id} is none of the {classes} classes of the logits; is the tokenizer "
                "the model's own, and the model resized to it?"
            )
        self.shape = labels.shape
        if labels.ndim != 1:
            logits, labels = logits.reshape(-1, classes), labels.reshape(-1)
        self._logits, self._config = logits, config
        found, position = numbers.positions(labels)
        self.counted = found if logits.row_mask is None else found & logits.row_mask  # (N,)
        # Finding the rows gives a size that depends on the labels, which a compiled graph cannot have.
        self._index = None if torch.compiler.is_compiling() else self.counted.nonzero().squeeze(1)
        if self._index is not None:
            logits, position = logits[self._index], position[self._index]
        number_logits = logits.class_logits(numbers.token_ids)
        self.values = numbers.values.to(number_logits.device, number_logits.dtype)  # (J,)
        self.targets = self.values[position]  # (n',)
        self.probabilities = number_logits.softmax(-1)  # (n', J)
        self._number_lse = number_logits.logsumexp(-1)

    @property
    def means(self) -> Tensor:  # (n',)
        return self.probabilities @ self.values

    def reweighed(self, loss: Tensor, largest: float) -> Tensor:  # (n',) -> (n',)
        """The loss; with `reweigh`, the one that counts the probability of what is no number token."""
        if not self._config.reweigh:
            return loss
        lse = self._logits.statistics("lse", row_mask=self.counted, **self._config.statistics_options()).lse
        log_mass = self._number_lse - self.take(lse)
        return log_mass.exp() * loss - 1.01 * largest * log_mass.expm1()

    def take(self, rows: Tensor) -> Tensor:  # (N,) -> (n',)
        return rows if self._index is None else rows[self._index]

    def spread(self, rows: Tensor) -> Tensor:  # (n',) -> (...)
        """The rows in their places, 0 in the others."""
        if self._index is None:
            return torch.where(self.counted, rows, torch.zeros_like(rows)).reshape(self.shape)
        return rows.new_zeros(self.counted.shape).index_copy(0, self._index, rows).reshape(self.shape)
