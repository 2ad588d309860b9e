"""Three conditional distributions with known densities: z given (x, y), on [-1, 1] in bins.

Random numbers are asked for in the order of the authors' repository, and the same fifth of the samples is for testing:
a seed gives the samples that the published numbers were measured on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BINS = 50
VARIANCE = 0.01
DEVIATION = VARIANCE**0.5
CENTRES = -1 + (2 * torch.arange(BINS, dtype=torch.float64) + 1) / BINS


class ToyData(NamedTuple):
    """Samples of one distribution; the last fifth is for testing."""

    inputs: Tensor  # (n, 2): the bins of x and y, as numbers
    labels: Tensor  # (n,): the bin of z
    truth: Tensor  # (n, BINS): the density given x and y at the bins' centres, normalised


def draw(name: str, samples: int, seed: int) -> ToyData:
    """Draw from `"gaussian"`, `"mixture"` or `"beta"`; what falls outside [-1, 1] counts as in the outermost bin."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.8, 0.8, samples)
    y = rng.uniform(-0.8, 0.8, samples) if name == "mixture" else rng.normal(x, DEVIATION)
    if name == "gaussian":
        z = rng.normal(y, DEVIATION)
    elif name == "mixture":
        z = np.array([rng.normal(a if rng.random() < 0.5 else b, DEVIATION) for a, b in zip(x, y, strict=True)])
    else:
        z = rng.choice([1, -1], samples) * rng.beta(np.abs(100 * x), np.abs(100 * y))
    order = np.random.RandomState(42).permutation(samples)
    tested = -(-samples // 5)
    x, y, z = (values[np.concatenate((order[tested:], order[:tested]))] for values in (x, y, z))
    first, second = torch.from_numpy(x)[:, None], torch.from_numpy(y)[:, None]
    inputs = torch.stack((_bin(x), _bin(y)), -1).float()
    return ToyData(inputs, _bin(z), torch.softmax(_log_density(name, first, second), -1))


def _log_density(name: str, x: Tensor, y: Tensor) -> Tensor:
    if name == "gaussian":
        return -((CENTRES - y) ** 2) / (2 * VARIANCE)
    if name == "mixture":
        sides = [-((CENTRES - mean) ** 2) / (2 * VARIANCE) for mean in (x, y)]
        return torch.logsumexp(torch.stack([torch.log_softmax(side, -1) for side in sides]), 0)
    return torch.distributions.Beta(100 * x.abs(), 100 * y.abs()).log_prob(CENTRES.abs())


def _bin(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.clip(np.floor((values + 1) / 2 * BINS), 0, BINS - 1)).long()


DISTRIBUTIONS = ("gaussian", "mixture", "beta")
