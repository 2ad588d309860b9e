"""The continuous densities of the Fourier head, against quadrature."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_fourier import SIZE, head
from xhead.heads import FourierDensity


def density(batch=(3,), frequencies=6, dtype=torch.float64, bounds=(-1.0, 1.0)):
    parts = torch.randn(2, *batch, frequencies + 1, dtype=dtype)
    return FourierDensity(parts[0], parts[1], bounds=bounds)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (2.0, 12.0)])
def test_density_against_quadrature(bounds):
    p = density(bounds=bounds)
    grid = torch.linspace(*bounds, 20001, dtype=torch.float64)[:, None].expand(-1, 3)
    values = p.density(grid)
    assert (values >= 0).all()
    assert torch.allclose(torch.trapezoid(values, grid, dim=0), torch.ones(3).double(), atol=1e-9)
    assert torch.allclose(torch.trapezoid(values * grid, grid, dim=0), p.mean, atol=1e-6)
    centred = values * (grid - p.mean) ** 2
    assert torch.allclose(torch.trapezoid(centred, grid, dim=0), p.variance, atol=1e-6)
    assert torch.allclose(-torch.trapezoid(torch.special.xlogy(values, values), grid, dim=0), p.entropy(), atol=1e-4)
    steps = torch.cumulative_trapezoid(values, grid, dim=0)
    assert torch.allclose(steps, p.cdf(grid)[1:], atol=1e-6)
    assert torch.allclose(p.log_prob(grid), values.log())
    outside = torch.tensor([bounds[0] - 0.1, bounds[1] + 0.1])[:, None].expand(-1, 3)
    assert not p.density(outside).any() and (p.log_prob(outside) == -math.inf).all()
    assert torch.equal(p.cdf(outside).round(decimals=12), torch.tensor([0.0, 1.0]).double()[:, None].expand(-1, 3))


@settings(max_examples=30)
@given(frequencies=st.integers(1, 80), seed=st.integers(0, 1000), double=st.booleans())
def test_quantile_inverts_cdf(frequencies, seed, double):
    torch.manual_seed(seed)
    p = density((2,), frequencies, torch.float64 if double else torch.float32)
    levels = torch.linspace(0, 1, 11, dtype=p.real.dtype)[:, None]
    found = p.quantile(levels)
    assert found.shape == (11, 2)
    assert (found.diff(dim=0) >= 0).all() and (found.abs() <= 1).all()
    assert torch.allclose(p.cdf(found), levels.expand(-1, 2), atol=1e-12 if double else 2e-5)
    assert torch.allclose(
        p.cdf(torch.tensor([-1.0, 1.0])[:, None]), torch.tensor([0.0, 1.0], dtype=levels.dtype)[:, None], atol=1e-5
    )


def test_samples_have_the_distribution():
    p = density((2,), bounds=(0.0, 5.0))
    draws = p.sample((4000,), torch.Generator().manual_seed(1))
    assert draws.shape == (4000, 2)
    # Kolmogorov-Smirnov: above 1.95 / sqrt(n) once in a thousand.
    levels = p.cdf(draws).sort(0).values
    assert (levels - (torch.arange(4000)[:, None] + 0.5) / 4000).abs().max() < 1.95 / math.sqrt(4000)
    assert (draws.mean(0) - p.mean).abs().max() < 4 * (p.variance.max() / 4000) ** 0.5


def test_density_of_the_head_is_what_the_bins_sample():
    layer = head(200, 9, floor=0.0, bounds=(-3.0, 5.0))
    hidden = torch.randn(2, SIZE, dtype=torch.float64)
    p = layer.density(hidden)
    centres = -3 + (torch.arange(200).double() + 0.5) * 8 / 200
    assert torch.allclose(layer(hidden).exp().T, p.density(centres[:, None].expand(-1, 2)) * 8 / 200)
    uniform = FourierDensity(torch.tensor([2.0, 0.0]), torch.zeros(2), bounds=(0.0, 4.0))
    assert torch.allclose(uniform.entropy(), torch.tensor(4.0).log())
    assert torch.allclose(uniform.quantile(0.25), torch.tensor(1.0))


def test_density_gradients():
    parts = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    value = torch.tensor([-0.3, 0.8], dtype=torch.float64)

    def answers(parts):
        p = FourierDensity(parts[0], parts[1])
        return p.log_prob(value), p.cdf(value), p.mean, p.variance, p.entropy()

    assert torch.autograd.gradcheck(answers, (parts,))


def test_no_density():
    p = FourierDensity(torch.zeros(3), torch.zeros(3))
    for answer in (p.density(torch.tensor(0.1)), p.cdf(torch.tensor(0.1)), p.mean, p.quantile(0.5), p.sample()):
        assert answer.isnan()
    with pytest.raises(ValueError, match=r"a quantile's level must lie in \[0, 1\], got 1.5"):
        density().quantile(1.5)
    with pytest.raises(ValueError, match="real and imaginary must both be"):
        FourierDensity(torch.zeros(3), torch.zeros(4))


def test_plot():
    pytest.importorskip("matplotlib")
    p = density((2, 2), bounds=(0.0, 3.0))
    axes = p.plot(color="black")
    assert len(axes.lines) == 4 and axes.get_xlim() == (0.0, 3.0)
    assert p.plot(axes) is axes and len(axes.lines) == 8
