"""Losses with any number of right classes a row: a binary loss for every class, summed.

The sum over all classes as if each were wrong is one statistic; the few right classes are gathered and put right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.engines.problem import column_rows
from xhead.engines.summands import SUMMANDS
from xhead.losses import register
from xhead.losses.config import ExactConfig, check_number
from xhead.statistics import compressed_columns


@dataclass(frozen=True)
class SigmoidConfig(ExactConfig):
    """Options of `"sigmoid"`."""


@register(
    "sigmoid",
    SigmoidConfig,
    formula="sum_k softplus(o_k) - sum_{k in labels} o_k: binary cross-entropy, summed over the classes",
    statistics=("pointwise_sum", "target"),
    source="logistic loss of each class",
)
def sigmoid_rows(logits: Any, labels: Tensor, config: SigmoidConfig) -> Tensor:
    """`sum_k softplus(o_k) - sum_{k in labels} o_k`: binary cross-entropy with logits, summed over the classes.

    Args:
        logits: LazyLogits (n, V).
        labels: (n,), one right class a row; (n, K) classes, -1 for none; or sparse CSR (n, V). A class that is named
            twice in a row counts once.

    Returns: (n,). Raises RuntimeError for labels of another shape, IndexError for a class out of range.
    """
    return _binary_rows(logits, labels, config, "softplus", (), lambda positive: -positive)


@dataclass(frozen=True)
class AsymmetricConfig(ExactConfig):
    """Options of `"asymmetric"`: focusing powers of the right and the wrong classes (at least 0), and margin in [0, 1),
    the probability up to which a wrong class costs nothing."""

    gamma_positive: float = 1.0
    gamma_negative: float = 4.0
    margin: float = 0.05

    def __post_init__(self) -> None:
        check_number("gamma_positive", self.gamma_positive, 0.0)
        check_number("gamma_negative", self.gamma_negative, 0.0)
        check_number("margin", self.margin, 0.0)
        if self.margin >= 1:
            raise ValueError(f"margin must be below 1, got {self.margin!r}: at 1 no wrong class would cost anything")


@register(
    "asymmetric",
    AsymmetricConfig,
    formula="right classes -(1 - x)^gamma_positive log x, wrong ones -z^gamma_negative log(1 - z), "
    "z = max(x - margin, 0), x = sigmoid(o)",
    statistics=("pointwise_sum", "target"),
    source="arXiv 2009.14119",
)
def asymmetric_rows(logits: Any, labels: Tensor, config: AsymmetricConfig) -> Tensor:
    """Right classes `-(1 - x)^gamma_positive log x`, wrong ones `-z^gamma_negative log(1 - z)`, summed.

    `x = sigmoid(o)`, `z = max(x - margin, 0)`. The focusing weights are differentiated too.
    Arguments, shapes and errors as `sigmoid_rows`.
    """
    parameters = (config.gamma_negative, config.margin)

    def correction(positive: Tensor) -> Tensor:
        missing = torch.sigmoid(-positive).clamp(min=torch.finfo(positive.dtype).tiny)
        right = -(missing**config.gamma_positive) * F.logsigmoid(positive)
        return right - SUMMANDS["asymmetric"].value(positive, *parameters)

    return _binary_rows(logits, labels, config, "asymmetric", parameters, correction)


def _binary_rows(
    logits: Any,
    labels: Tensor,
    config: ExactConfig,
    pointwise: str,
    parameters: tuple[float, ...],
    correction: Callable[[Tensor], Tensor],
) -> Tensor:
    """`sum_k s(o_k) + sum_{k in labels} correction(o_k)`, s the summand named by `pointwise`: (n,)"""
    options = {"pointwise": pointwise, "pointwise_parameters": parameters, **config.statistics_options()}
    if labels.layout == torch.strided and labels.ndim == 1:
        s = logits.statistics("pointwise_sum", "target", target=labels, **options)
        return s.pointwise_sum + correction(s.target)
    sets = label_sets(labels, logits)
    s = logits.statistics("pointwise_sum", "column_logits", columns=sets.labels, **options)
    return s.pointwise_sum.index_add(0, sets.row, correction(s.column_logits))


class LabelSets(NamedTuple):
    """The right classes of each row: E pairs of a row and a class, by row and then by class, none twice."""

    labels: Tensor  # (n, K) or sparse CSR (n, V): the argument `columns` of the statistics
    row: Tensor  # (E,)
    column: Tensor  # (E,)
    count: Tensor  # (n,) right classes a row


def label_sets(labels: Tensor, logits: Any) -> LabelSets:
    """Labels in any of their forms, of `logits` (n, V), as pairs; errors as `sigmoid_rows`.

    labels: (n,); (n, K), -1 for none; or sparse CSR (n, V)
    """
    if labels.layout == torch.strided and labels.ndim == 1:
        labels = labels[:, None]
    _check_labels(labels, logits.shape)
    labels = labels.to(logits.device)
    offsets, column = compressed_columns(labels, logits.shape[:-1], logits.shape[-1])
    return LabelSets(labels, column_rows(offsets), column, offsets.diff())


def target_logits(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each right class once: its row, its place among the row's, and its logit, (E,) each.

    logits: LazyLogits (n, V); labels and errors: see `label_sets`.
    """
    sets = label_sets(labels, logits)
    starts = sets.count.cumsum(0) - sets.count
    position = torch.arange(sets.row.shape[0], device=sets.row.device) - starts[sets.row]
    return sets.row, position, logits.statistics("column_logits", columns=sets.labels).column_logits


def _check_labels(labels: Tensor, shape: torch.Size) -> None:
    sparse = labels.layout == torch.sparse_csr and labels.shape == shape
    padded = labels.layout == torch.strided and labels.ndim == 2 and labels.shape[0] == shape[0]
    if not sparse and not (padded and labels.dtype == torch.int64):
        raise RuntimeError(
            f"labels must be int64 of shape ({shape[0]},) or ({shape[0]}, K) with -1 for none, or sparse CSR of shape "
            f"{tuple(shape)}, got {labels.dtype} of shape {tuple(labels.shape)} and layout {labels.layout}; a dense "
            "matrix of zeros and ones becomes sparse with labels.to_sparse_csr()"
        )
