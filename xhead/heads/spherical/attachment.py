"""An optimiser whose steps are a head's steps too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Optimizer

if TYPE_CHECKING:
    from xhead.heads.spherical.head import SphericalHead


class Attachment:
    """Calls `head.step` after each step of the optimiser, with the rates of the group that holds `head.proxy`."""

    def __init__(self, head: SphericalHead, optimizer: Optimizer, rate_factor: float | None) -> None:
        while not isinstance(optimizer, Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
            inner = getattr(optimizer, "optimizer", None)
            if inner is None:
                raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
            optimizer = inner
        self.head, self.optimizer = head, optimizer
        _check_factors(head, optimizer)
        group = self._group()
        if group.get("maximize"):
            raise ValueError("the head's group has maximize=True: the head only minimises")
        plain = isinstance(optimizer, SGD) and not group.get("momentum")
        if rate_factor is None and not plain:
            kind = f"{type(optimizer).__name__}{' with momentum' if isinstance(optimizer, SGD) else ''}"
            raise ValueError(
                f"the head takes plain SGD steps, and the learning rate {float(group['lr'])} of its group is meant for "
                f"{kind}: give attach(optimizer, rate_factor=...), the head's learning rate over the group's"
            )
        self.rate_factor = 1.0 if rate_factor is None else float(rate_factor)
        self.handle = optimizer.register_step_post_hook(self._stepped)

    def remove(self) -> None:
        self.handle.remove()

    def _group(self) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            if any(parameter is self.head.proxy for parameter in group["params"]):
                return group
        raise ValueError(
            "the optimiser does not hold the head's proxy: give it head.parameters(), in the group whose learning rate "
            "is the head's"
        )

    def _stepped(self, *_: Any) -> None:
        group = self._group()
        self.head.step(float(group["lr"]) * self.rate_factor, float(group.get("weight_decay", 0.0)))
        with torch.no_grad():
            self.head.proxy.zero_()


def _check_factors(head: SphericalHead, optimizer: Optimizer) -> None:
    state = {tensor.data_ptr(): name for name, tensor in head.weight.tensors().items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = state.get(parameter.data_ptr()) if parameter.numel() else None
            if name is not None:
                raise ValueError(
                    f"{type(optimizer).__name__} holds the head's {name}, which only the head itself can update: give "
                    "the optimiser head.parameters() alone"
                )
