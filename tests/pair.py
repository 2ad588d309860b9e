"""Lazy logits and the stock computation on the same leaves."""

import torch
import torch.nn.functional as F

from xhead.lazy import LazyLogits

ROWS, CLASSES, WIDTH = (2, 5), 11, 7


class Pair:
    """`lazy` and `dense` are the same logits of the same leaves."""

    def __init__(self, dtype=torch.float64, bias=True, **options):
        self.hidden = torch.randn(*ROWS, WIDTH, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(CLASSES, WIDTH, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(CLASSES, dtype=dtype, requires_grad=True) if bias else None
        self.vector = torch.randn(CLASSES, dtype=dtype, requires_grad=True)
        self.number = torch.tensor(1.7, dtype=dtype, requires_grad=True)
        self.lazy = LazyLogits(self.hidden, self.weight, self.bias, **options)
        dense = F.linear(self.hidden, self.weight, self.bias) * options.get("scale", 1.0)
        softcap = options.get("softcap")
        self.dense = dense if softcap is None else softcap * torch.tanh(dense / softcap)

    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias, self.vector, self.number) if t is not None]

    def gradients(self, value, create_graph=False):
        return torch.autograd.grad(
            value, self.leaves(), allow_unused=True, retain_graph=True, create_graph=create_graph
        )


def loss_of(logits, **options):
    target = torch.arange(logits.shape[:-1].numel()) % logits.shape[-1]
    target[1] = -100
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target, **options)
