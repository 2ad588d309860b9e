"""Gradients for a few rows of a weight that others use whole, without a tensor of the weight's size for each.

The gradient for rows taken with `rows_of` is sparse. Where a dense gradient comes after it and nobody else holds that,
autograd adds the two in place. Both have to meet for it, ahead of whatever expects a dense gradient: at `shared`.
"""

from typing import Any

import torch
from torch import Tensor


class _Shared(torch.autograd.Function):
    """The identity, whose incoming gradients are summed by autograd before they come out as one, dense."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return grad.to_dense() if grad.is_sparse else grad


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = weight.shape
        return weight.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (index,) = grads, ctx.saved_tensors
        if torch.is_grad_enabled():
            # A derivative of this derivative: sparse tensors do not have all of that.
            return grad.new_zeros(ctx.shape).index_add(0, index, grad), None
        return torch.sparse_coo_tensor(index[None], grad, ctx.shape, check_invariants=False), None


def shared(weight: Tensor) -> Tensor:
    """The same weight (V, D), to be used by several whose gradients for it are then summed in one place."""
    if torch.compiler.is_compiling() or not weight.requires_grad or not torch.is_grad_enabled():
        return weight
    return _Shared.apply(weight)  # type: ignore[return-value]


def rows_of(weight: Tensor, index: Tensor) -> Tensor:
    """`weight[index]`: (V, D), (J,) -> (J, D). The gradient is sparse on its way where the weight is a `shared` one."""
    if torch.compiler.is_compiling() or not isinstance(weight.grad_fn, _Shared._backward_cls):
        return weight.index_select(0, index)
    return _Rows.apply(weight, index)  # type: ignore[return-value]
