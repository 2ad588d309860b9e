"""The Mann-Whitney loss of each row: every right class against every wrong one."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xhead.engines.pair_sums import PairSums
from xhead.losses import register
from xhead.losses.config import check_number
from xhead.losses.multilabel import label_sets
from xhead.losses.multilabel_softmax import over_positives
from xhead.losses.row_functions import apply


@dataclass(frozen=True)
class MannWhitneyConfig:
    """Options of `"mann_whitney"`: what the logits are divided by."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.0, above_least=True)


@register(
    "mann_whitney",
    MannWhitneyConfig,
    formula="mean over y in labels and k not in labels of log(1 + exp(o_k - o_y))",
    statistics=("pointwise_sum", "column_logits"),
    source="the MW loss, arXiv 2510.00137, within rows",
)
def mann_whitney_rows(logits: Any, labels: Tensor, config: MannWhitneyConfig) -> Tensor:
    """`mean_{y in P, k in N} softplus(s_k - s_y)`: by log 2, an upper bound of the share of pairs in the wrong order.

    P are the right classes, N the others, `s = o / temperature`; 0 where either is empty. The paper's pairs also lie
    across rows: `xhead.losses.pairs.auc`. The cost beyond one pass grows with the largest number of right classes.
    Arguments, shapes and errors as `infonce_rows`.
    """
    sets = label_sets(labels, logits)

    (sums,) = apply(PairSums(), logits / config.temperature, sets.labels)
    wrong = (logits.shape[-1] - sets.count).clamp(min=1)
    return over_positives(sums, sets.row, sets.count) / wrong
