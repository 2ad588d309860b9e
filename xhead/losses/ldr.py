"""Label-distributionally robust loss: a log-sum-exp of margins at a temperature.

Source: arXiv 2112.14869. Its adaptive form, which keeps a temperature for each sample of the data set, is not here: a
loss is not told which sample a row is.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from xhead.losses import register
from xhead.losses.config import ExactConfig, check_number


@dataclass(frozen=True)
class LabelDistributionConfig(ExactConfig):
    """Options of `"ldr_kl"`: temperature, above 0 (towards 0 the multi-class hinge, at 1 without a margin cross-entropy
    less log V, towards infinity the average margin), and margin, what a class other than the target must stay below it.
    """

    temperature: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.0, above_least=True)
        check_number("margin", self.margin)


@register(
    "ldr_kl",
    LabelDistributionConfig,
    formula="t log(1/V sum_k exp((o_k - o_y + margin 1[k != y]) / t))",
    statistics=("complement_lse", "target"),
    source="arXiv 2112.14869",
)
def label_distribution_rows(logits: Any, labels: Tensor, config: LabelDistributionConfig) -> Tensor:
    """`t log(1/V sum_k exp((o_k - o_y + margin 1[k != y]) / t))`, t the temperature; down to `-t log V`.

    The target's own term of the sum is 1, and the others come without it: where the margin is met, what is left is
    smaller than what a difference of log-sum-exps could resolve.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    t = config.temperature
    s = (logits / t).statistics(
        "complement_lse", "target", target=labels, columns=labels[:, None], **config.statistics_options()
    )
    others = s.complement_lse - s.target + config.margin / t
    # F.softplus is linear above 20, which float64 can tell.
    return t * (-F.logsigmoid(-others) - math.log(logits.shape[-1]))
