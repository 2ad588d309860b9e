"""The options of losses that ask for statistics with a pass over all classes."""

from dataclasses import dataclass
from typing import Any

import torch

from xhead.statistics import filter_threshold


@dataclass(frozen=True)
class StatisticsOptions:
    """How statistics are computed; see `xhead.statistics.row_statistics` for what each means."""

    filter_eps: float | str | None = "auto"
    compensate: bool = True
    filter_hidden_grad: bool = True
    filter_weight_grad: bool = True
    engine: str = "auto"

    def __post_init__(self) -> None:
        filter_threshold(self.filter_eps, torch.float32)

    def statistics_options(self) -> dict[str, Any]:
        return {
            "filter_eps": self.filter_eps,
            "compensate": self.compensate,
            "filter_hidden_grad": self.filter_hidden_grad,
            "filter_weight_grad": self.filter_weight_grad,
            "engine": self.engine,
        }
