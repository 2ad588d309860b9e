"""The Fourier head: a distribution over ordered bins that is a smooth density's values at their centres.

arXiv 2410.22269 (ICLR 2025). A linear layer gives each row N + 1 complex coefficients `a_l = u_l + i v_l`. With m bins
on [-1, 1], centred at `x_b = -1 + (2b + 1)/m`, and `A(x) = sum_l a_l exp(i pi l x)`,

    q_b = |A(x_b)|^2 / S,     S = sum_b |A(x_b)|^2,     log p_b = log((q_b + floor) / (1 + m floor)).

S needs no bins. Frequencies l and l + m agree at all centres up to the sign `(-1)^(m+1)`, and frequencies below m are
orthogonal over them: with a folded onto 0 .. m - 1 accordingly, `S = m |folded a|^2`. So a label's loss reads its own
bin only.
"""

import functools
import math

import torch
from torch import Tensor, nn

from xhead.heads.fourier_density import FourierDensity, autocorrelation, check_bounds
from xhead.statistics import check_range


class FourierHead(nn.Module):
    """Hidden states (..., D) -> a distribution over `num_bins` ordered bins, from `num_frequencies` frequencies.

    `forward(hidden)` gives the log-probabilities of all bins, `loss(hidden, labels)` those of the labels alone, in
    O(num_frequencies) a row after the linear layer and with no tensor of bins, `density(hidden)` the continuous one.

    Args:
        in_features: D, the width of the hidden states.
        num_bins: m, at least 2. Bin b covers `[low + b width, low + (b + 1) width]`, and is evaluated at its centre.
        num_frequencies: N, at least 1 and below m: frequencies from m on say nothing about m bins that the lower ones
            do not. About the smallest width that can be told apart is 1/N of the bounds.
        regularization: factor of the smoothness penalty that `loss` adds to each row, `4 pi^2 sum_k k^2 |r_k|^2` with
            `r_k = c_k / c_0` and c the autocorrelation of a: 4 times the integral of the squared slope of the density
            on [-1, 1].
        scale_free: False puts `c_k` in the place of `r_k`, as the authors' code has it; that penalty can be
            lowered by smaller coefficients, which leave the distribution as it is.
        floor: what is added to each q_b; `m floor / (1 + m floor)` of the mass is then uniform. With 0, a
            label on a zero of A costs inf.
        init_scale: the linear layer starts as `torch.nn.Linear` does, times this; one factor, or (weight, bias).
            Gradients for a go with 1/|a|, so that plain SGD wants a larger one than the default, which is the authors'.
        bounds: the interval that the bins cover, for `density` alone.
        allow_aliasing: take `num_frequencies >= num_bins` too, where the distribution folds as written above.
        device, dtype: of the parameters.

    The linear layer runs in the dtype of its input, under autocast in autocast's; everything after it in
    float32 (float64 for float64), and with real numbers only but for the penalty's FFT. Rows that are not finite give
    NaN, in loss and distribution, and so do coefficients that are all zero.

    The density is periodic: bins 0 and m - 1 are neighbours. Where that is wrong for the data, leave bins at both ends
    unused.

    Raises:
        ValueError: sizes, bounds or factors out of range.
    """

    def __init__(
        self,
        in_features: int,
        num_bins: int,
        num_frequencies: int,
        *,
        regularization: float = 0.0,
        scale_free: bool = True,
        floor: float = 1e-5,
        init_scale: float | tuple[float, float] = 0.01,
        bounds: tuple[float, float] = (-1.0, 1.0),
        allow_aliasing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(num_bins, num_frequencies, allow_aliasing)
        for name, value in (("regularization", regularization), ("floor", floor)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        check_bounds(bounds)
        self.in_features, self.num_bins, self.num_frequencies = in_features, num_bins, num_frequencies
        self.regularization, self.scale_free, self.floor, self.bounds = regularization, scale_free, floor, bounds
        self.init_scale = (init_scale, init_scale) if isinstance(init_scale, (int, float)) else tuple(init_scale)
        if len(self.init_scale) != 2 or not all(scale > 0 for scale in self.init_scale):
            raise ValueError(f"init_scale must be a positive number or two, got {init_scale!r}")
        self.linear = nn.Linear(in_features, 2 * (num_frequencies + 1), device=device, dtype=dtype)
        self.scale_parameters()

    @torch.no_grad()
    def scale_parameters(self) -> None:
        """Multiply weight and bias by `init_scale`."""
        for parameter, scale in zip((self.linear.weight, self.linear.bias), self.init_scale, strict=True):
            parameter.mul_(scale)

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        self.linear.reset_parameters()
        self.scale_parameters()

    def coefficients(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # (..., D)
        """u and v, the real and imaginary parts of a, each (..., N + 1), in float32 or float64."""
        if hidden.ndim < 1 or hidden.shape[-1] != self.in_features:
            raise ValueError(f"hidden must be (..., {self.in_features}), got {tuple(hidden.shape)}")
        weight, bias = self.linear.weight.to(hidden.dtype), self.linear.bias.to(hidden.dtype)
        found = nn.functional.linear(hidden, weight, bias)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        real, imaginary = found.chunk(2, -1)
        return real, imaginary

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D)
        """The log-probabilities of all bins, (..., m), in nats: one GEMM, (2n, N + 1) by (N + 1, m), for n rows."""
        real, imaginary = self.coefficients(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            weights = _squared_moduli(real, imaginary, self.num_bins) / self._total(real, imaginary).unsqueeze(-1)
            return (weights + self.floor).log() - math.log1p(self.num_bins * self.floor)

    def loss(self, hidden: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:  # (..., D), (...)
        """`-log p_label` plus the smoothness penalty, in nats, (...); 0 where the label is `ignore_index`.

        Raises ValueError for labels of another shape or of floating dtype, IndexError for one outside [0, m).
        """
        if labels.shape != hidden.shape[:-1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be whole numbers of shape {tuple(hidden.shape[:-1])}, one a row of hidden, got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        kept = labels != ignore_index
        known = labels.masked_fill(~kept, 0)
        check_range("label", known, self.num_bins)
        if torch.compiler.is_compiling() or labels.device.type != "cpu":
            # Finding which rows count would make the host wait for the device.
            rows = self._loss_rows(hidden, known)
            return torch.where(kept, rows, torch.zeros_like(rows))
        if kept.all():
            return self._loss_rows(hidden, labels)
        rows = self._loss_rows(hidden[kept], labels[kept])
        return rows.new_zeros(labels.shape).masked_scatter(kept, rows)

    def density(self, hidden: Tensor) -> FourierDensity:  # (..., D)
        """The continuous density over `bounds`, of batch shape (...); without the floor."""
        return FourierDensity(*self.coefficients(hidden), bounds=self.bounds)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_bins={self.num_bins}, num_frequencies={self.num_frequencies}, "
            f"regularization={self.regularization}, floor={self.floor}"
        )

    def _loss_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:
        real, imaginary = self.coefficients(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            cosine, sine = _waves(labels.long(), self.num_bins, real)
            at_label = _dot(real, cosine, imaginary, -sine).square() + _dot(real, sine, imaginary, cosine).square()
            rows = -(at_label / self._total(real, imaginary) + self.floor).log()
            rows = rows + math.log1p(self.num_bins * self.floor)
            if self.regularization:
                rows = rows + self.regularization * self._roughness(real, imaginary)
        return rows

    def _total(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """S, (...): the sum over all bins of the squared modulus."""
        real, imaginary = _fold(real, self.num_bins), _fold(imaginary, self.num_bins)
        return self.num_bins * (real.square().sum(-1) + imaginary.square().sum(-1))

    def _roughness(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """`4 pi^2 sum_k k^2 |r_k|^2`, or with c_k in the place of r_k, (...)."""
        real, imaginary = autocorrelation(real, imaginary)
        power = real.square() + imaginary.square()
        orders = torch.arange(power.shape[-1], dtype=power.dtype, device=power.device)
        found = 4 * math.pi**2 * (power * orders.square()).sum(-1)
        return found / power[..., 0] if self.scale_free else found


def check_sizes(num_bins: int, num_frequencies: int, allow_aliasing: bool = False) -> None:
    """Raise ValueError where so many frequencies do not go with so many bins."""
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}")
    if num_frequencies < 1:
        raise ValueError(f"num_frequencies must be at least 1, got {num_frequencies}")
    if num_frequencies >= num_bins and not allow_aliasing:
        raise ValueError(
            f"num_frequencies is {num_frequencies}, and {num_bins} bins can carry at most {num_bins - 1}: higher ones "
            "fold onto the lower. Take fewer frequencies or more bins, or allow_aliasing=True to fold them"
        )


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
