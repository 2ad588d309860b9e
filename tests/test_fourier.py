"""The Fourier head against direct float64 evaluation of its formulas, bin by bin and frequency by frequency."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.dense import relative_error
from xhead.heads import FourierHead
from xhead.heads.fourier_density import autocorrelation

SIZE = 5
# Frequencies against bins: few, many, as many as bins can carry, odd and even numbers of bins, and folded ones.
SHAPES = [(1, 2), (3, 7), (12, 50), (6, 7), (49, 50), (40, 64), (64, 18), (7, 7), (8, 4), (21, 5)]


def head(bins, frequencies, dtype=torch.float64, **options):
    options = {"init_scale": 1.0, "allow_aliasing": True, **options}
    return FourierHead(SIZE, bins, frequencies, dtype=dtype, **options)


def direct_masses(layer, hidden):
    """q, (n, m): |A(x_b)|^2 over its sum, one complex exponential at a time."""
    found = layer.linear(hidden).double()
    half = found.shape[-1] // 2
    coefficients = torch.complex(found[..., :half], found[..., half:])
    centres = -1 + (2 * torch.arange(layer.bins.num_bins).double() + 1) / layer.bins.num_bins
    orders = torch.arange(half).double()
    waves = torch.exp(1j * math.pi * orders[:, None] * centres)
    squares = (coefficients[..., None] * waves).sum(-2).abs().square()
    return squares / squares.sum(-1, keepdim=True)


def direct_log_probs(layer, hidden):
    return ((direct_masses(layer, hidden) + layer.bins.floor) / (1 + layer.bins.num_bins * layer.bins.floor)).log()


@pytest.mark.parametrize(("frequencies", "bins"), SHAPES)
@pytest.mark.parametrize("floor", [1e-5, 0.0, 0.01])
def test_distribution_and_loss_are_the_formula(frequencies, bins, floor):
    layer = head(bins, frequencies, floor=floor)
    hidden = torch.randn(9, SIZE, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9) % bins
    expected = direct_log_probs(layer, hidden)
    found = layer(hidden)
    assert (found.exp() - expected.exp()).abs().max() < 1e-10
    assert torch.allclose(found.logsumexp(-1), torch.zeros(9).double(), atol=1e-12)
    rows = layer.loss(hidden, labels)
    assert rows.shape == labels.shape
    dense = -expected.gather(-1, labels[:, None]).squeeze(-1)
    assert torch.allclose(rows, dense, atol=1e-10)
    upstream = torch.rand(9, dtype=torch.float64)
    parameters = (hidden, layer.linear.weight, layer.linear.bias)
    true = torch.autograd.grad(dense, parameters, upstream)
    at_bins = torch.autograd.grad(-found.gather(-1, labels[:, None]).squeeze(-1), parameters, upstream)
    for one, other, right in zip(torch.autograd.grad(rows, parameters, upstream), at_bins, true, strict=True):
        assert relative_error(one, right) < 1e-9
        assert relative_error(other, right) < 1e-9


def test_the_published_size():
    layer = head(4096, 550)
    hidden = torch.randn(3, SIZE, dtype=torch.float64)
    expected = direct_log_probs(layer, hidden)
    assert (layer(hidden).exp() - expected.exp()).abs().max() < 1e-10
    labels = torch.tensor([0, 2047, 4095])
    assert torch.allclose(layer.loss(hidden, labels), -expected[range(3), labels], atol=1e-10)


@settings(max_examples=40)
@given(bins=st.integers(2, 40), frequencies=st.integers(1, 60), seed=st.integers(0, 1000))
def test_any_size(bins, frequencies, seed):
    torch.manual_seed(seed)
    layer, hidden = head(bins, frequencies), torch.randn(4, SIZE, dtype=torch.float64)
    labels = torch.randint(bins, (4,))
    assert torch.allclose(layer(hidden).exp(), direct_log_probs(layer, hidden).exp(), atol=1e-10)
    assert torch.allclose(layer.loss(hidden, labels), -layer(hidden)[range(4), labels], atol=1e-9)


@pytest.mark.parametrize("scale_free", [True, False])
def test_smoothness_penalty(scale_free):
    factor = 0.01
    layer = head(9, 4, regularization=factor, scale_free=scale_free)
    hidden, labels = torch.randn(6, SIZE, dtype=torch.float64), torch.arange(6)
    plain = head(9, 4)
    plain.load_state_dict(layer.state_dict())
    penalty = layer.loss(hidden, labels) - plain.loss(hidden, labels)
    real, imaginary = layer.coefficients(hidden)
    a = torch.complex(real, imaginary)
    c = torch.stack([(a[:, k:] * a[:, : 5 - k].conj()).sum(-1) for k in range(5)], -1)
    assert torch.allclose(torch.complex(*autocorrelation(real, imaginary)), c)
    r = c / c[:, :1] if scale_free else c
    expected = factor * 4 * math.pi**2 * sum(k**2 * r[:, k].abs() ** 2 for k in range(5))
    assert torch.allclose(penalty, expected)
    if scale_free:
        grid = torch.linspace(-1, 1, 2001, dtype=torch.float64)
        curves = layer.density(hidden).density(grid[:, None].expand(-1, 6))
        slope = torch.gradient(curves, spacing=(grid,), dim=0)[0]
        integral = torch.trapezoid(slope.square(), grid, dim=0)
        assert torch.allclose(penalty, factor * 4 * integral, rtol=1e-3)
        with torch.no_grad():
            layer.linear.weight *= 3.0
            layer.linear.bias *= 3.0
            plain.load_state_dict(layer.state_dict())
        assert torch.allclose(layer.loss(hidden, labels) - plain.loss(hidden, labels), expected)


@pytest.mark.parametrize(("frequencies", "bins"), [(3, 7), (6, 7), (9, 4)])
def test_gradcheck(frequencies, bins):
    layer = head(bins, frequencies, regularization=0.01)
    hidden = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, bins - 1])

    def loss(hidden, weight, bias):
        return torch.func.functional_call(
            _Loss(layer), {"layer.linear.weight": weight, "layer.linear.bias": bias}, (hidden, labels)
        )

    operands = (hidden, layer.linear.weight, layer.linear.bias)
    assert torch.autograd.gradcheck(loss, operands)
    assert torch.autograd.gradgradcheck(loss, operands)


class _Loss(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, labels):
        return self.layer.loss(hidden, labels)


def test_ignored_rows_and_empty_batches():
    layer = head(7, 3, dtype=torch.float32)
    hidden = torch.randn(2, 3, SIZE, requires_grad=True)
    labels = torch.tensor([[0, -100, 6], [-100, 2, 3]])
    rows = layer.loss(hidden, labels)
    assert rows.shape == (2, 3)
    assert torch.equal(rows == 0, labels == -100)
    assert torch.allclose(rows[labels != -100], layer.loss(hidden[labels != -100], labels[labels != -100]))
    rows.sum().backward()
    assert not hidden.grad[labels == -100].any()
    spoiled = hidden.detach().clone()
    spoiled[labels == -100] = math.nan
    assert layer.loss(spoiled, labels).isfinite().all()
    ignored = layer.loss(hidden, torch.full((2, 3), -100))
    assert not ignored.any()
    layer.zero_grad()
    ignored.sum().backward()
    assert not layer.linear.weight.grad.any()
    assert layer.loss(hidden[:0], labels[:0]).shape == (0, 3)
    assert layer(hidden[:0]).shape == (0, 3, 7)
    assert layer(hidden[0, 0]).shape == (7,)
    assert layer.loss(hidden[0, 0], torch.tensor(4)).shape == ()


def test_bins():
    layer = head(5, 2, bounds=(-1.0, 4.0))
    assert layer.bin_edges().tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert layer.bin_centers().tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    values = torch.tensor([-9.0, -0.5, 0.25, 3.9, 4.0, 9.0]).double()
    assert torch.bucketize(values, layer.bin_edges()[1:-1]).tolist() == [0, 0, 1, 4, 4, 4]
    assert FourierHead(SIZE, 50, 12, 1e-6).bins.regularization == 1e-6
    layer, hidden = head(5, 2, bounds=(-1.0, 4.0), floor=0.0), torch.randn(6, SIZE, dtype=torch.float64)
    curves = layer.density(hidden).density(layer.bin_centers()[:, None].expand(-1, 6)).T
    assert torch.allclose(layer(hidden).exp(), curves / curves.sum(-1, keepdim=True))


def test_a_sharp_distribution():
    layer = head(64, 60)
    with torch.no_grad():  # the squared Dirichlet kernel about the centre of bin 20
        centre = -1 + 41 / 64
        layer.linear.weight.zero_()
        phase = math.pi * torch.arange(61).double() * centre
        layer.linear.bias.copy_(torch.cat((phase.cos(), -phase.sin())))
    hidden = torch.zeros(1, SIZE, dtype=torch.float64)
    assert layer(hidden).exp()[0, 20] > 0.9
    assert layer.loss(hidden, torch.tensor([20])) < 0.1
    assert abs(layer.density(hidden).mean - centre) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    layer = head(50, 12, dtype=dtype)
    hidden = torch.randn(40, SIZE, dtype=dtype, requires_grad=True)
    labels = torch.randint(50, (40,))
    expected = -direct_log_probs(layer, hidden)[range(40), labels]
    rows = layer.loss(hidden, labels)
    assert rows.dtype == torch.float32
    assert layer(hidden).dtype == torch.float32
    assert torch.allclose(rows.double(), expected, rtol=1e-4, atol=1e-4)
    true = torch.autograd.grad(expected.sum(), (hidden, layer.linear.weight))
    found = torch.autograd.grad(rows.sum(), (hidden, layer.linear.weight))
    slack = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for mine, right in zip(found, true, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, right) < slack


def test_high_frequencies_keep_their_phase_in_float32():
    exact = head(4096, 550)
    single = copy.deepcopy(exact).float()
    hidden = torch.randn(20, SIZE, dtype=torch.float64)
    labels = torch.randint(4096, (20,))
    assert torch.allclose(single.loss(hidden.float(), labels).double(), exact.loss(hidden, labels), atol=2e-3)
    assert torch.allclose(single(hidden.float()).exp().double(), exact(hidden).exp(), atol=1e-7)


def test_autocast_is_that_of_a_linear_layer():
    layer, hidden, labels = head(50, 12, torch.float32), torch.randn(30, SIZE), torch.randint(50, (30,))
    half = copy.deepcopy(layer).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rows, log_probs = layer.loss(hidden, labels), layer(hidden)
    assert torch.equal(rows, half.loss(hidden.bfloat16(), labels))
    assert torch.equal(log_probs, half(hidden.bfloat16()))


def test_bad_input():
    for wrong, message in [
        ({"num_bins": 1}, "num_bins must be at least 2, got 1"),
        ({"num_frequencies": 0}, "num_frequencies must be at least 1, got 0"),
        ({"num_frequencies": 50}, "is 50, and 50 bins can carry at most 49.*allow_aliasing"),
        ({"regularization": -1.0}, "regularization must be a finite number of at least 0, got -1.0"),
        ({"floor": math.nan}, "floor must be a finite number"),
        ({"init_scale": 0.0}, "init_scale must be a positive number or two, got 0.0"),
        ({"bounds": (1.0, 1.0)}, r"bounds must be two finite numbers, the lower first, got \(1.0, 1.0\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            FourierHead(**{"in_features": SIZE, "num_bins": 50, "num_frequencies": 12, **wrong})
    layer = head(7, 3, torch.float32)
    with pytest.raises(ValueError, match=r"hidden must be \(..., 5\), got \(2, 4\)"):
        layer(torch.randn(2, 4))
    hidden = torch.randn(3, SIZE)
    with pytest.raises(IndexError, match="label 7 is out of bounds"):
        layer.loss(hidden, torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match=r"labels must be whole numbers of shape \(3,\)"):
        layer.loss(hidden, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="float32"):
        layer.loss(hidden, torch.rand(3))
    for value in (math.nan, math.inf):
        hidden[1, 0] = value
        assert layer(hidden).isnan().any(-1).tolist() == [False, True, False]
        assert layer.loss(hidden, torch.tensor([0, 1, 2])).isnan().tolist() == [False, True, False]
    with torch.no_grad():
        layer.linear.bias.zero_()
    assert layer(torch.zeros(SIZE)).isnan().all()


def test_reload_is_bit_equal(tmp_path):
    layer = head(50, 12, torch.float32, init_scale=(0.001, 0.1))
    assert layer.linear.weight.abs().max() <= 0.001 / math.sqrt(SIZE)
    hidden = torch.randn(4, SIZE)
    expected = layer(hidden)
    torch.save(layer.state_dict(), tmp_path / "head.pt")
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias"}
    with torch.device("meta"):
        again = FourierHead(SIZE, 50, 12)
    again.to_empty(device="cpu").load_state_dict(torch.load(tmp_path / "head.pt"))
    assert torch.equal(again(hidden), expected)
    with torch.inference_mode():
        fresh = FourierHead(SIZE, 23, 7)(hidden)
    assert fresh.shape == (4, 23)
    FourierHead(SIZE, 23, 7)(hidden).sum().backward()  # what inference left behind serves training


def test_compiles():
    layer, hidden, labels = head(50, 12, torch.float32), torch.randn(6, SIZE), torch.randint(50, (6,))
    labels[2] = -100
    compiled = torch.compile(layer.loss, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(hidden, labels), layer.loss(hidden, labels), atol=1e-6)
    assert torch.allclose(torch.compile(layer, backend="aot_eager", fullgraph=True)(hidden), layer(hidden), atol=1e-6)
