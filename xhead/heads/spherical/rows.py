"""A factored weight in a training loop: rows whose backward leaves the gradient with the head, and who applies it.

The weight's factors are no parameters. In their place stands one number, a parameter named `proxy`: its gradient is the
Frobenius norm of the gradient of W. So whatever treats gradients by their norm or as a whole works unchanged: clipping
by the global norm, a gradient scaler, `zero_grad`, a frozen model; and the optimiser's group that holds it tells the
learning rate and the weight decay. The step itself is the head's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xhead.heads.spherical.factored import split
from xhead.heads.spherical.step import row_gradients
from xhead.heads.spherical.targets import Targets
from xhead.losses.spherical_family import Slopes

if TYPE_CHECKING:
    from xhead.heads.spherical.head import SphericalHead


class SphericalRows(torch.autograd.Function):
    """The loss of each row; its backward gives the gradient of hidden, and adds the weight's to the head's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, proxy: Tensor, head: SphericalHead, targets: Targets) -> Tensor:
        weight, loss = head.weight, head.loss
        products = hidden @ weight.core
        parts = split(products, weight.size)
        variance = torch.linalg.vecdot(parts.covariance, hidden).clamp_(min=0)
        target_rows = weight.target_rows(targets.classes)
        target = target_rows.scores(hidden, products)
        rows = loss.rows(parts.mean, variance, target, weight.classes, targets.values)
        if proxy.requires_grad or hidden.requires_grad:
            ctx.save_for_backward(hidden, products, variance, target)
            ctx.head, ctx.target_rows, ctx.values = head, target_rows, targets.values
            ctx.version = weight.core._version
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        head = ctx.head
        hidden, products, variance, target = ctx.saved_tensors
        weight = head.weight
        if ctx.version != weight.core._version:
            raise RuntimeError(
                "the head has been updated or loaded since this loss was computed: call backward() before "
                "optimizer.step(), and compute the loss again after it"
            )
        mean = split(products, weight.size).mean
        slopes = head.loss.slopes(mean, variance, target, weight.classes, ctx.values)
        slopes = Slopes(slopes.mean * upstream, slopes.variance * upstream, slopes.target * upstream[:, None])
        gradients, of_hidden = row_gradients(weight, hidden.detach(), products, ctx.target_rows, slopes)
        if not ctx.needs_input_grad[1]:
            return of_hidden, None, None, None
        head.gradient.arrive(gradients)
        return of_hidden, hidden.new_zeros(1), None, None
