"""Three conditional distributions with known densities: z given (x, y), on [-1, 1] in bins."""

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
    """Samples of one distribution."""

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
        z = rng.normal(np.where(rng.random(samples) < 0.5, x, y), DEVIATION)
    else:
        z = rng.choice([-1, 1], samples) * rng.beta(np.abs(100 * x), np.abs(100 * y))
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
