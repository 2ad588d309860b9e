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
from xhead.losses.config import FilterConfig, check_number


@dataclass(frozen=True)
class LabelDistributionConfig(FilterConfig):
    """Options of `"ldr_kl"`: temperature, above 0 (towards 0 the multi-class hinge, at 1 without a margin cross-entropy
    less log V, towards infinity the average margin), and margin, what a class other than the target must stay below it.

    With a margin other than 0 the gradient is not filtered.
    """

    temperature: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, 0.0, above_least=True)
        check_number("margin", self.margin)


@register(
    "ldr_kl",
    LabelDistributionConfig,
    formula="t log(1/V sum_k exp((o_k - o_y + margin 1[k != y]) / t))",
    statistics=("lse", "target", "complement_lse"),
    source="arXiv 2112.14869",
)
def label_distribution_rows(logits: Any, labels: Tensor, config: LabelDistributionConfig) -> Tensor:
    """`t log(1/V sum_k exp((o_k - o_y + margin 1[k != y]) / t))`, t the temperature; down to `-t log V`.

    With a margin, the others are summed without the target, whose own term is 1: where the margin is met, what is left
    of them is smaller than what a difference of log-sum-exps could resolve.

    logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    t, options = config.temperature, config.statistics_options()
    tempered, uniform = logits / t, math.log(logits.shape[-1])
    if config.margin == 0:
        s = tempered.statistics("lse", "target", target=labels, **options)
        return t * (s.lse - s.target - uniform)
    s = tempered.statistics("complement_lse", "target", target=labels, columns=labels[:, None], **options)
    others = s.complement_lse - s.target + config.margin / t
    # F.softplus is linear above 20, which float64 can tell.
    return t * (-F.logsigmoid(-others) - uniform)
