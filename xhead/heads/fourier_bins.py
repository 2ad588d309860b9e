"""The arithmetic of the Fourier head: a distribution over ordered bins from complex coefficients.

With m bins on [-1, 1], centred at `x_b = -1 + (2b + 1)/m`, and `A(x) = sum_{l=0..N} a_l exp(i pi l x)`,

    q_b = |A(x_b)|^2 / S,     S = sum_b |A(x_b)|^2,     log p_b = log((q_b + floor) / (1 + m floor)).

S needs no bins. Frequencies l and l + m agree at all centres up to the sign `(-1)^(m+1)`, and frequencies below m are
orthogonal over them: with a folded onto 0 .. m - 1 accordingly, `S = m |folded a|^2`. So a label's loss reads its own
bin only.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xhead.heads.fourier_density import autocorrelation


@dataclass(frozen=True)
class FourierBins:
    """Distributions over `num_bins` bins from coefficients `a = real + i imaginary`, (..., N + 1) each.

    See `FourierHead` for the fields. Everything is in the dtype of the coefficients, float32 or float64.

    Raises ValueError for a field out of range.
    """

    num_bins: int
    num_frequencies: int
    regularization: float = 0.0
    scale_free: bool = True
    floor: float = 1e-5
    allow_aliasing: bool = False

    def __post_init__(self) -> None:
        if self.num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {self.num_bins}")
        if self.num_frequencies < 1:
            raise ValueError(f"num_frequencies must be at least 1, got {self.num_frequencies}")
        if self.num_frequencies >= self.num_bins and not self.allow_aliasing:
            raise ValueError(
                f"num_frequencies is {self.num_frequencies}, and {self.num_bins} bins can carry at most "
                f"{self.num_bins - 1}: higher ones fold onto the lower. Take fewer frequencies or more bins, or "
                "allow_aliasing=True to fold them"
            )
        for name, value in (("regularization", self.regularization), ("floor", self.floor)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")

    def log_probs(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """log p of all bins, (..., m), in nats: one GEMM, (2n, N + 1) by (N + 1, m), for n rows."""
        masses = _squared_moduli(real, imaginary, self.num_bins) / self._total(real, imaginary).unsqueeze(-1)
        return (masses + self.floor).log() - math.log1p(self.num_bins * self.floor)

    def loss_rows(self, real: Tensor, imaginary: Tensor, labels: Tensor) -> Tensor:
        """`-log p_label` plus the penalty, in nats, (...), for labels (...) int64 in [0, m): O(N) a row."""
        cosine, sine = _waves(labels, self.num_bins, real)
        at_label = _dot(real, cosine, imaginary, -sine).square() + _dot(real, sine, imaginary, cosine).square()
        rows = -(at_label / self._total(real, imaginary) + self.floor).log()
        rows = rows + math.log1p(self.num_bins * self.floor)
        if self.regularization:
            rows = rows + self.regularization * self.roughness(real, imaginary)
        return rows

    def roughness(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """`4 pi^2 sum_k k^2 |r_k|^2`, or with c_k in the place of r_k, (...), in O(N log N) a row."""
        real, imaginary = autocorrelation(real, imaginary)
        power = real.square() + imaginary.square()
        orders = torch.arange(power.shape[-1], dtype=power.dtype, device=power.device)
        found = 4 * math.pi**2 * (power * orders.square()).sum(-1)
        return found / power[..., 0] if self.scale_free else found

    def _total(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """S, (...): the sum over all bins of the squared modulus."""
        real, imaginary = _fold(real, self.num_bins), _fold(imaginary, self.num_bins)
        return self.num_bins * (real.square().sum(-1) + imaginary.square().sum(-1))


def _dot(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
    return torch.linalg.vecdot(first, second) + torch.linalg.vecdot(third, fourth)


def _fold(part: Tensor, num_bins: int) -> Tensor:  # (..., N + 1) -> (..., min(N + 1, m))
    """Frequencies l + j m added to l, with the sign that they have at the centres."""
    if part.shape[-1] <= num_bins:
        return part
    turns = -(-part.shape[-1] // num_bins)
    padded = nn.functional.pad(part, (0, turns * num_bins - part.shape[-1])).unflatten(-1, (turns, num_bins))
    if num_bins % 2 == 0:
        padded = padded * (1 - 2 * (torch.arange(turns, device=part.device) % 2)).to(part.dtype).unsqueeze(-1)
    return padded.sum(-2)


def _waves(bins: Tensor, num_bins: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of `pi l x_b`, (..., N + 1), for each of the bins (...).

    `pi l x_b = pi (l (2b + 1 - m) mod 2m) / m`: the turns are left out in whole numbers, so the phase is exact
    however large l is, and 2m cosines serve all.
    """
    angles = torch.arange(2 * num_bins, device=like.device, dtype=torch.float64) * (math.pi / num_bins)
    orders = torch.arange(like.shape[-1], device=like.device)
    index = torch.remainder((2 * bins + 1 - num_bins).unsqueeze(-1) * orders, 2 * num_bins)
    return angles.cos().to(like.dtype)[index], angles.sin().to(like.dtype)[index]


def _squared_moduli(real: Tensor, imaginary: Tensor, num_bins: int) -> Tensor:  # (..., N + 1) each
    """`|A(x_b)|^2` of all bins, (..., m).

    The centres are symmetric, `x_b = -x_{m-1-b}`, so cosines and sines of half of them serve for all: u cos, v sin,
    u sin and v cos come from one product, and their sums and differences are the two halves.
    """
    matrix = _half_waves if torch.compiler.is_compiling() else _kept_half_waves
    waves = matrix(num_bins, real.shape[-1], real.dtype, real.device)
    half = waves.shape[-1] // 2
    products = torch.stack((real, imaginary)) @ waves  # (2, ..., 2 half)
    (u_cos, u_sin), (v_cos, v_sin) = (part.split(half, -1) for part in products)
    left = (u_cos - v_sin).square() + (u_sin + v_cos).square()
    right = (u_cos + v_sin).square() + (v_cos - u_sin).square()
    return torch.cat((left, right[..., : num_bins - half].flip(-1)), -1)


def _half_waves(num_bins: int, orders: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos and sin of `pi l x_b` side by side for the first half of the bins, (N + 1, 2 ceil(m / 2))."""
    with torch.inference_mode(False), torch.no_grad():
        bins = torch.arange((num_bins + 1) // 2, device=device)
        cosine, sine = _waves(bins, num_bins, torch.empty(orders, dtype=dtype, device=device))
        return torch.cat((cosine, sine)).T.contiguous()


# Not a buffer of the module: casts of the module would round it, and loading on the meta device would lose it.
_kept_half_waves = functools.lru_cache(maxsize=4)(_half_waves)
