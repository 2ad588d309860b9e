"""The Fourier head: a distribution over ordered bins that is a smooth density's values at their centres."""

import torch
from torch import Tensor, nn

from xhead.heads.base import InnerLinear
from xhead.heads.fourier_bins import FourierBins
from xhead.heads.fourier_density import FourierDensity, check_bounds
from xhead.statistics import check_range


class FourierHead(nn.Module):
    """Hidden states (..., D) -> a distribution over `num_bins` ordered bins, from `num_frequencies` frequencies.

    A linear layer gives each row N + 1 complex coefficients a. The density is `|sum_l a_l exp(i pi l x)|^2 / (2 |a|^2)`
    on [-1, 1], never negative, and a bin's probability its value at the bin's centre, over the sum of these.
    `forward(hidden)` gives the log-probabilities of all bins, `loss(hidden, labels)` those of the labels alone, in
    O(N) a row after the linear layer and with no tensor of bins, `density(hidden)` the continuous one.

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
        allow_aliasing: take `num_frequencies >= num_bins` too, where the distribution folds onto the lower ones.
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
        regularization: float = 0.0,
        *,
        scale_free: bool = True,
        floor: float = 1e-5,
        init_scale: float | tuple[float, float] = 0.01,
        bounds: tuple[float, float] = (-1.0, 1.0),
        allow_aliasing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_bounds(bounds)
        self.in_features, self.bounds = in_features, bounds
        self.bins = FourierBins(num_bins, num_frequencies, regularization, scale_free, floor, allow_aliasing)
        self.init_scale = (init_scale, init_scale) if isinstance(init_scale, (int, float)) else tuple(init_scale)
        if len(self.init_scale) != 2 or not all(scale > 0 for scale in self.init_scale):
            raise ValueError(f"init_scale must be a positive number or two, got {init_scale!r}")
        self.linear = InnerLinear(in_features, 2 * (num_frequencies + 1), device=device, dtype=dtype)
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

    def bin_edges(self) -> Tensor:
        """(m + 1,) float64: bin b is from edge b to edge b + 1; `torch.bucketize(values, edges[1:-1])` gives labels."""
        return torch.linspace(*self.bounds, self.bins.num_bins + 1, dtype=torch.float64)

    def bin_centers(self) -> Tensor:
        """(m,) float64: where each bin's density is evaluated."""
        edges = self.bin_edges()
        return (edges[1:] + edges[:-1]) / 2

    def coefficients(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # (..., D)
        """u and v, the real and imaginary parts of a, each (..., N + 1), in float32 or float64."""
        if hidden.ndim < 1 or hidden.shape[-1] != self.in_features:
            raise ValueError(f"hidden must be (..., {self.in_features}), got {tuple(hidden.shape)}")
        found = self.linear(hidden)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        real, imaginary = found.chunk(2, -1)
        return real, imaginary

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D)
        """The log-probabilities of all bins, (..., m), in nats: one GEMM, (2n, N + 1) by (N + 1, m), for n rows."""
        real, imaginary = self.coefficients(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.bins.log_probs(real, imaginary)

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
        check_range("label", known, self.bins.num_bins)
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
        return f"in_features={self.in_features}, bins={self.bins}, bounds={self.bounds}"

    def _loss_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:
        real, imaginary = self.coefficients(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.bins.loss_rows(real, imaginary, labels.long())
