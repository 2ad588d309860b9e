"""Cross-entropy of the stablemax, which has no exponential to saturate: source arXiv 2501.04697."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xhead.losses import register
from xhead.losses.config import ExactConfig


@dataclass(frozen=True)
class StablemaxConfig(ExactConfig):
    """Options of `"stablemax"`."""


@register(
    "stablemax",
    StablemaxConfig,
    formula="-log(s(o_y) / sum_k s(o_k)), s(o) = o + 1 above 0, 1 / (1 - o) below",
    statistics=("pointwise_sum", "target"),
    source="arXiv 2501.04697",
)
def stablemax_rows(logits: Any, labels: Tensor, config: StablemaxConfig) -> Tensor:
    """`-log(s(o_y) / sum_k s(o_k))`, `s(o) = o + 1` where `o >= 0`, else `1 / (1 - o)`.

    Not invariant to a shift of all logits. logits: LazyLogits (n, V), labels: (n,) -> (n,)
    """
    s = logits.statistics(
        "pointwise_sum", "target", target=labels, pointwise="stablemax", **config.statistics_options()
    )
    o = s.target
    log_target = torch.where(o >= 0, torch.log1p(o.clamp(min=0)), -torch.log1p(-o.clamp(max=0)))
    return s.pointwise_sum.log() - log_target
