"""How smooth a distribution over ordered bins is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTHS = 100


def smoothness(masses: Tensor) -> Tensor:  # (..., m)
    """`sum_{s=1..100} 6/(pi s)^2 |q - q * g_s|_2`, (...): the distance from blurs by a Gaussian g_s of s bins.

    Both ends of the bins meet. Lower is smoother; the weights sum to about 1. The metric of arXiv 2410.22269.
    """
    bins = masses.shape[-1]
    offsets = torch.arange(1 - bins, bins, dtype=torch.float64)
    widths = torch.arange(1, WIDTHS + 1, dtype=torch.float64)
    blurs = torch.softmax(-(offsets**2) / (2 * widths[:, None] ** 2), -1)
    wrapped = torch.zeros(WIDTHS, bins, dtype=torch.float64).index_add_(1, offsets.long() % bins, blurs)
    lost = (1 - torch.fft.fft(wrapped).real).square()  # (widths, m): the share of each wave's power that a blur takes
    power = torch.fft.fft(masses.double()).abs().square() / bins
    distances = (power @ lost.T.to(power.device)).sqrt()
    return distances @ (6 / (math.pi * widths) ** 2).to(power.device)
