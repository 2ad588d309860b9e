"""A spherical head, a batch for it, and the same head with a dense weight."""

import torch

from tests.spherical_definitions import target_matrix
from xhead.heads import SphericalHead

CLASSES, SIZE = 997, 17
RATES = {"mse": 0.003, "zloss": 2.0, "log_taylor": 0.5, "log_spherical": 0.02}


class Dense:
    """The same head with a dense weight, autograd and torch's SGD."""

    def __init__(self, head, definition, options, **rates):
        self.weight = head.dense().double().requires_grad_()
        self.definition, self.options = definition, options
        self.optimizer = torch.optim.SGD([self.weight], **rates)

    def rows(self, hidden, classes, values=None):
        return self.definition(hidden @ self.weight.T, target_matrix(classes, CLASSES, values), **self.options)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def make(name="zloss", options=None, classes=CLASSES, size=SIZE, dtype=torch.float64, **more):
    weight = 0.3 * torch.randn(classes, size, dtype=torch.float64) + 0.2
    return SphericalHead(size, classes, name, weight=weight, dtype=dtype, **(options or {}), **more)


def batch(rows, targets=1, ignored=False):
    """Hidden states, and classes of which half are those of other rows, one twice in a row."""
    hidden = torch.randn(rows, SIZE, dtype=torch.float64)
    classes = torch.randint(CLASSES, (rows, targets))
    classes[rows // 2 :] = classes[: rows - rows // 2].clone()
    if targets > 1:
        classes[0, 1] = classes[0, 0]
    if ignored:
        classes[-1] = -100
        classes[0, -1] = -100
    return hidden.requires_grad_(), classes
