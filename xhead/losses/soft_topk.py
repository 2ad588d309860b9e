"""The soft top-k loss: right classes are pulled over a threshold that lets k classes of the row pass."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from xhead.engines.soft_topk import SoftTopk
from xhead.losses import register, vectors
from xhead.losses.config import check_number
from xhead.losses.multilabel import label_sets
from xhead.losses.multilabel_softmax import over_positives
from xhead.losses.row_functions import apply


@dataclass(frozen=True)
class SoftTopkConfig:
    """Options of `"soft_topk"`: one k or several, the sharpness alpha, and what the logits are divided by."""

    k: int | tuple[int, ...] = 5
    alpha: float = 2.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0, above_least=True)
        check_number("temperature", self.temperature, 0.0, above_least=True)
        if not self.ks or not all(isinstance(k, int) and k >= 1 for k in self.ks):
            raise ValueError(f"k must be a whole number of at least 1, or a tuple of such, got {self.k!r}")

    @property
    def ks(self) -> tuple[int, ...]:
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)


@register(
    "soft_topk",
    SoftTopkConfig,
    formula="mean over y in labels of -log sigmoid(alpha (o_y + t)), with sum_j sigmoid(alpha (o_j + t)) = k",
    statistics=("pointwise_sum", "column_logits"),
    source="DEXML, arXiv 2310.10636",
)
def soft_topk_rows(logits: Any, labels: Tensor, config: SoftTopkConfig) -> Tensor:
    """`mean_{y in P} -log sigmoid(alpha (s_y + t))`, t such that `sum_j sigmoid(alpha (s_j + t)) = k`, `s = o / T`.

    P are the right classes; a row without any is 0. For several k, the mean over them. The gradient goes through t, by
    the implicit function theorem. Some rows are worked on at a time, and tiles in the backward.
    Arguments and shapes as `infonce_rows`; raises ValueError where k is not below V.
    """
    sets = label_sets(labels, logits)
    classes = logits.shape[-1]
    if max(config.ks) >= classes:
        raise ValueError(f"k must be below the number of classes {classes}, got {max(config.ks)}")

    function = SoftTopk(config.ks, config.alpha, vectors.BLOCK_BYTES // 2)
    column_logits, threshold = apply(function, logits / config.temperature, sets.labels)
    each = -F.logsigmoid(config.alpha * (column_logits[:, None] + threshold.index_select(0, sets.row)))
    return over_positives(each.mean(1), sets.row, sets.count)
