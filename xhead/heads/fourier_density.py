"""Densities that are squared moduli of trigonometric polynomials: evaluated, integrated, inverted and drawn from.

With coefficients `a_l = u_l + i v_l`, l = 0 .. N, and `A(x) = sum_l a_l exp(i pi l x)`,

    p(x) = |A(x)|^2 / (2 |a|^2) = 1/2 + Re sum_{k=1..N} r_k exp(i k pi x)       on [-1, 1]

where `r_k = c_k / c_0` and `c_k = sum_l a_{l+k} conj(a_l)` is the autocorrelation. p is never negative and
integrates to 1.
"""

import math
from typing import Any

import torch
from torch import Tensor


def autocorrelation(real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:  # (..., N + 1) each
    """Real and imaginary parts, (..., N + 1), of `c_k = sum_l a_{l+k} conj(a_l)`, k = 0 .. N, in O(N log N)."""
    size = real.shape[-1]
    spectrum = torch.fft.fft(torch.complex(real, imaginary), 2 * size)
    found = torch.fft.ifft(spectrum.real.square() + spectrum.imag.square())[..., :size]
    return found.real, found.imag


class FourierDensity:
    """A batch of densities `p(x) = |sum_l a_l exp(i pi l x)|^2 / (2 |a|^2)`, x in [-1, 1] stretched to `bounds`.

    Args:
        real, imaginary: (..., N + 1) parts of the coefficients a; computed with in float32, or float64 where they are.
        bounds: the interval `(low, high)` that the density lives on. p is periodic: its values at both ends are equal.

    The batch shape is `real.shape[:-1]`. As in `torch.distributions`, a value has the shape (..., *batch shape) or one
    that broadcasts with the batch shape. Coefficients that are all zero, or not finite, make every answer NaN.
    `log_prob`, `density`, `cdf`, `mean` and `entropy` are differentiable for the coefficients.

    Raises ValueError where shapes or bounds do not fit. Source: Fourier head, arXiv 2410.22269.
    """

    def __init__(self, real: Tensor, imaginary: Tensor, bounds: tuple[float, float] = (-1.0, 1.0)):
        if real.shape != imaginary.shape or real.ndim < 1:
            raise ValueError(
                f"real and imaginary must both be (..., N + 1), got {tuple(real.shape)} and {tuple(imaginary.shape)}"
            )
        check_bounds(bounds)
        self.low, self.high = bounds
        dtype = torch.promote_types(real.dtype, torch.float32)
        self.real, self.imaginary = real.to(dtype), imaginary.to(dtype)

    @property
    def batch_shape(self) -> torch.Size:
        return self.real.shape[:-1]

    @property
    def num_frequencies(self) -> int:
        return self.real.shape[-1] - 1

    def density(self, value: Tensor) -> Tensor:  # (..., *batch shape)
        """p(value), in probability per unit of `value`; 0 outside the bounds."""
        position, inside = self._position(value)
        cosine, sine = self._waves(position, 0)
        real = (self.real * cosine - self.imaginary * sine).sum(-1)
        imaginary = (self.real * sine + self.imaginary * cosine).sum(-1)
        found = (real.square() + imaginary.square()) / (self._energy() * (self.high - self.low))
        return torch.where(inside, found, found * 0)

    def log_prob(self, value: Tensor) -> Tensor:  # (..., *batch shape)
        """log p(value), in nats; -inf outside the bounds and where p is 0."""
        return self.density(value).log()

    def cdf(self, value: Tensor) -> Tensor:  # (..., *batch shape)
        """The integral of p up to `value`: `(x + 1)/2 + Re sum_k r_k (exp(i k pi x) - (-1)^k) / (i k pi)`.

        0 below the bounds and 1 above.
        """
        position = self._position(value)[0].clamp(-1, 1)
        real, imaginary, rate = self._series()
        cosine, sine = self._waves(position, 1)
        waves = (real * sine + imaginary * (cosine - self._signs())) / rate
        return ((position + 1) / 2 + waves.sum(-1)).clamp(0, 1)

    @property
    def mean(self) -> Tensor:
        """The expectation, of the batch shape: `sum_k 2 (-1)^k Im(r_k) / (k pi)`, stretched to the bounds."""
        _, imaginary, rate = self._series()
        position = (2 * self._signs() * imaginary / rate).sum(-1)
        return self._value(position)

    @property
    def variance(self) -> Tensor:
        """`1/3 + sum_k 4 (-1)^k Re(r_k) / (k pi)^2 - mean^2`, of the batch shape, stretched to the bounds."""
        real, imaginary, rate = self._series()
        square = 1 / 3 + (4 * self._signs() * real / rate.square()).sum(-1)
        position = (2 * self._signs() * imaginary / rate).sum(-1)
        return (square - position.square()) * ((self.high - self.low) / 2) ** 2

    @torch.no_grad()
    def quantile(self, level: Tensor | float) -> Tensor:  # (..., *batch shape)
        """The value whose cdf is `level`, in [0, 1], by bisection to the last bit of the dtype. Not differentiable."""
        level = torch.as_tensor(level, dtype=self.real.dtype, device=self.real.device)
        wrong = (level < 0) | (level > 1)
        if wrong.any():
            raise ValueError(f"a quantile's level must lie in [0, 1], got {level[wrong].flatten()[0].item()}")
        below = level.new_full(torch.broadcast_shapes(level.shape, self.batch_shape), -1.0)
        above = -below
        for _ in range(round(-math.log2(torch.finfo(self.real.dtype).eps)) + 2):
            middle = (below + above) / 2
            less = self.cdf(self._value(middle)) < level
            below, above = torch.where(less, middle, below), torch.where(less, above, middle)
        found = self._value((below + above) / 2)
        return found + 0 * self._energy().log()  # NaN where the coefficients give no density

    def sample(self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, (*shape, *batch shape): the quantiles of uniform levels."""
        levels = torch.rand(
            (*shape, *self.batch_shape), generator=generator, dtype=self.real.dtype, device=self.real.device
        )
        return self.quantile(levels)

    def entropy(self) -> Tensor:
        """The differential entropy `-int p log p` in nats, of the batch shape.

        The sum over 16 (N + 1) equispaced points, whose error falls with the third power of their number or faster.
        """
        points = 16 * self.real.shape[-1]
        waves = torch.fft.ifft(torch.complex(self.real, self.imaginary), points, norm="forward")
        ratio = (waves.real.square() + waves.imag.square()) / self._energy().unsqueeze(-1)
        return math.log(self.high - self.low) - torch.special.xlogy(ratio, ratio).mean(-1)

    def plot(self, axes: Any = None, points: int = 512, **style: Any) -> Any:
        """Draw every density of the batch over the bounds with matplotlib; `style` goes to `axes.plot`.

        Returns the axes: those given, or new ones.
        """
        if axes is None:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
        grid = torch.linspace(self.low, self.high, points, dtype=self.real.dtype, device=self.real.device)
        with torch.no_grad():
            curves = self.density(grid.reshape(-1, *[1] * len(self.batch_shape)).expand(-1, *self.batch_shape))
        axes.plot(grid.cpu().numpy(), curves.reshape(points, -1).cpu().numpy(), **style)
        axes.set_xlim(self.low, self.high)
        axes.set_ylim(bottom=0)
        return axes

    def _energy(self) -> Tensor:
        return (self.real.square() + self.imaginary.square()).sum(-1)

    def _position(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Where in [-1, 1] a value lies, and whether it is inside the bounds (NaN counts as inside, and stays NaN)."""
        value = torch.as_tensor(value, dtype=self.real.dtype, device=self.real.device)
        outside = (value < self.low) | (value > self.high)
        return (2 * value - (self.low + self.high)) / (self.high - self.low), ~outside

    def _value(self, position: Tensor) -> Tensor:
        return (self.low + self.high) / 2 + position * ((self.high - self.low) / 2)

    def _orders(self, first: int) -> Tensor:
        return torch.arange(first, self.real.shape[-1], dtype=self.real.dtype, device=self.real.device)

    def _signs(self) -> Tensor:
        return 1 - 2 * (self._orders(1) % 2)

    def _waves(self, position: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of k pi x for k = first .. N, (..., N + 1 - first); whole turns are left out before pi."""
        phase = torch.remainder(position.unsqueeze(-1) * self._orders(first), 2) * math.pi
        return phase.cos(), phase.sin()

    def _series(self) -> tuple[Tensor, Tensor, Tensor]:
        """Real and imaginary parts of r_k and the rates k pi, k = 1 .. N."""
        real, imaginary = autocorrelation(self.real, self.imaginary)
        energy = self._energy().unsqueeze(-1)
        return real[..., 1:] / energy, imaginary[..., 1:] / energy, self._orders(1) * math.pi


def check_bounds(bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"bounds must be two finite numbers, the lower first, got {bounds}")
