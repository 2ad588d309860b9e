"""Softmax losses with any number of right classes a row, as dual encoders for extreme classification are trained with.

The classes may be all labels of a data set or those of a batch: the weight of the logits holds a vector a label.
With `P` the right classes of a row, `N` all others and `s = o / temperature`; a row without right classes is 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.losses import register
from xhead.losses.config import ExactConfig, FilterConfig, check_number
from xhead.losses.multilabel import label_sets

_OVER_POSITIVES = ("mean", "sum")


@dataclass(frozen=True)
class InfoNCEConfig(FilterConfig):
    """Options of `"infonce"`: what the logits are divided by, and `"mean"` or `"sum"` over a row's right classes."""

    temperature: float = 1.0
    positives: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_options(self.temperature, self.positives)


@register(
    "infonce",
    InfoNCEConfig,
    formula="mean over y in labels of lse - o_y: the right classes share one softmax",
    statistics=("lse", "column_logits"),
    source="arXiv 1807.03748; several labels as in arXiv 2004.11362",
)
def infonce_rows(logits: Any, labels: Tensor, config: InfoNCEConfig) -> Tensor:
    """`mean_{y in P} ( log sum_k exp(s_k) - s_y )`: the least is at probability 1/|P| for every right class.

    Args:
        logits: LazyLogits (n, V).
        labels: (n,), one right class a row; (n, K) classes, -1 for none; or sparse CSR (n, V). A class that is named
            twice in a row counts once.

    Returns: (n,). Raises RuntimeError for labels of another shape, IndexError for a class out of range.
    """
    sets = label_sets(labels, logits)
    s = (logits / config.temperature).statistics(
        "lse", "column_logits", columns=sets.labels, **config.statistics_options()
    )
    each = s.lse.index_select(0, sets.row) - s.column_logits
    return over_positives(each, sets.row, sets.count, config.positives)


@dataclass(frozen=True)
class DecoupledSoftmaxConfig(ExactConfig):
    """Options of `"decoupled_softmax"`: as those of `"infonce"`, without a filter."""

    temperature: float = 1.0
    positives: str = "mean"

    def __post_init__(self) -> None:
        _check_options(self.temperature, self.positives)


@register(
    "decoupled_softmax",
    DecoupledSoftmaxConfig,
    formula="mean over y in labels of log(1 + sum_{k not in labels} exp(o_k - o_y))",
    statistics=("complement_lse", "column_logits"),
    source="DEXML, arXiv 2310.10636",
)
def decoupled_softmax_rows(logits: Any, labels: Tensor, config: DecoupledSoftmaxConfig) -> Tensor:
    """`mean_{y in P} -log( exp(s_y) / (exp(s_y) + sum_{k in N} exp(s_k)) )`: a right class meets the wrong ones only.

    No right class is pushed down for the sake of another. The sum leaves the right classes out while it is taken: what
    a difference of two sums would leave is lost in float32 once a right class leads by 17. A row whose classes are
    all right is 0. Arguments, shapes and errors as `infonce_rows`.
    """
    sets = label_sets(labels, logits)
    s = (logits / config.temperature).statistics(
        "complement_lse", "column_logits", columns=sets.labels, **config.statistics_options()
    )
    # With the usual threshold of 20, softplus is only its asymptote there, which float64 can tell.
    each = F.softplus(s.complement_lse.index_select(0, sets.row) - s.column_logits, threshold=50)
    return over_positives(each, sets.row, sets.count, config.positives)


def over_positives(each: Tensor, row: Tensor, count: Tensor, reduction: str = "mean") -> Tensor:
    """Mean (or sum) of a number an entry over each row's entries, 0 where a row has none.

    each, row: (E,), count: (n,) -> (n,)
    """
    total = torch.zeros(count.shape, dtype=each.dtype, device=each.device).index_add(0, row, each)
    return total if reduction == "sum" else total / count.clamp(min=1)


def _check_options(temperature: float, positives: str) -> None:
    check_number("temperature", temperature, 0.0, above_least=True)
    if positives not in _OVER_POSITIVES:
        raise ValueError(f"positives must be one of {', '.join(map(repr, _OVER_POSITIVES))}, got {positives!r}")
