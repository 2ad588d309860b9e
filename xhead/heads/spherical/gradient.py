"""The gradient that a head has gathered since its last step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xhead.heads.spherical.factored import FactoredWeight
from xhead.heads.spherical.step import RowGradients, Step, step_of


class Gradient:
    """Rows' gradients, kept until the step, with their norm in the gradient of `proxy`.

    Memory: about 5 D numbers a row, over all backward passes until the step.
    """

    def __init__(self) -> None:
        self._arrived: list[RowGradients] = []
        self._pass = -1
        self._clear()

    def _clear(self) -> None:
        self._step: Step | None = None
        self._norm = 0.0
        self._version = -1

    def arrive(self, gradients: RowGradients) -> None:
        """Rows from within a backward pass; they count once `proxy` has its gradient of that same pass.

        A pass for other gradients alone (`torch.autograd.grad`) never gives it one.
        """
        self._keep_to_this_pass()
        self._arrived.append(gradients)

    def _keep_to_this_pass(self) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._arrived, self._pass = [], current

    def settle(self, weight: FactoredWeight, proxy: Tensor) -> None:
        """After a backward pass: add what has arrived, and write the norm of all into `proxy.grad`."""
        assert proxy.grad is not None
        self._keep_to_this_pass()
        new = weight.gathered(_joined(self._arrived))
        self._arrived = []
        kept, before = None, self.scale(proxy)
        if self._step is not None and before:
            self._check_version(weight)
            kept = self._step.gradients if before == 1 else self._step.gradients.scaled(before)
        self._clear()
        total = _joined([each for each in (kept, new) if each is not None])
        if total is None:
            return
        self._step = step_of(weight, total)
        proxy.grad.copy_(self._step.norm)
        self._norm = float(proxy.grad)
        self._version = weight.core._version

    def scale(self, proxy: Tensor) -> float:
        """What the gradient has been multiplied by since, as seen in `proxy.grad`: 1 untouched, 0 for zero_grad."""
        now = 0.0 if proxy.grad is None else float(proxy.grad)
        if self._norm == 0:
            return 1.0
        return now / self._norm if now else 0.0

    def forget(self) -> None:
        self._arrived.clear()
        self._clear()

    def take(self, weight: FactoredWeight, proxy: Tensor) -> tuple[Step | None, float]:
        """The step and its factor; None where there is no gradient.

        Raises RuntimeError where the weight has changed since the gradient was computed.
        """
        step, scale = self._step, self.scale(proxy)
        if step is None or scale == 0 or proxy.grad is None:
            return None, 0.0
        self._check_version(weight)
        return step, scale

    def _check_version(self, weight: FactoredWeight) -> None:
        if self._version != weight.core._version:
            raise RuntimeError(
                "the head's state has changed since its gradient was computed: call zero_grad() and compute it again"
            )


def _joined(parts: list[RowGradients]) -> RowGradients | None:
    return functools.reduce(RowGradients.joined, parts) if parts else None
