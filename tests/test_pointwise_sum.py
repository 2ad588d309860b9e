"""The statistic `pointwise_sum` against its definition in float64, and its functions where floating point is thin."""

import math

import pytest
import torch

from tests.dense import dense_logits, relative_error
from tests.statistic_case import Case
from xhead.engines.summands import SUMMANDS
from xhead.statistics import row_statistics

FUNCTIONS = [
    ("softplus", ()),
    ("stablemax", ()),
    ("asymmetric", (4.0, 0.05)),
    ("asymmetric", (0.5, 0.2)),
    ("asymmetric", (0.0, 0.1)),
    ("asymmetric", (2.0, 0.0)),
    ("asymmetric", (0.0, 0.0)),
]
named = pytest.mark.parametrize(("name", "parameters"), FUNCTIONS, ids=lambda value: str(value))


def defined(name, parameters, logits):
    """The function by its formula, for logits of moderate size."""
    if name == "softplus":
        return (1 + logits.exp()).log()
    if name == "stablemax":
        return torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    gamma, margin = parameters
    sigmoid = 1 / (1 + (-logits).exp())
    counted = sigmoid > margin
    x = torch.where(counted, sigmoid - margin, 0.5)
    log_rest = (1 - x).log() if margin else -(1 + logits.exp()).log()
    return torch.where(counted, -(x**gamma) * log_rest, 0.0)


@named
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"scale": 0.7, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("engine", ["reference", "chunked"])
def test_value_and_gradients(name, parameters, options, engine):
    case = Case(rows=23, classes=1031, peak=0.5)
    logits = dense_logits(case.hidden, case.weight, case.bias, **options)
    expected = defined(name, parameters, logits).sum(-1)
    found = row_statistics(
        case.hidden, case.weight, ("pointwise_sum", "lse"), bias=case.bias, engine=engine,
        pointwise=name, pointwise_parameters=parameters, **options,
    )  # fmt: skip
    assert relative_error(found.pointwise_sum, expected) < 1e-12
    upstream = case.upstream["lse"]
    ours = torch.autograd.grad(((found.pointwise_sum + found.lse) * upstream).sum(), case.inputs)
    true = torch.autograd.grad(((expected + logits.logsumexp(-1)) * upstream).sum(), case.inputs)
    assert all(relative_error(mine, exact) < 1e-11 for mine, exact in zip(ours, true, strict=True))


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_pytorch(name, parameters, dtype):
    case = Case(dtype=dtype, peak=0.3)
    exact = defined(name, parameters, dense_logits(case.hidden, case.weight, case.bias)).sum(-1)
    dense = torch.nn.functional.linear(case.hidden, case.weight, case.bias).float()
    plain = SUMMANDS[name].value(dense, *parameters).sum(-1)
    found = row_statistics(
        case.hidden, case.weight, ("pointwise_sum",), bias=case.bias, engine="chunked",
        pointwise=name, pointwise_parameters=parameters,
    ).pointwise_sum  # fmt: skip
    assert found.dtype == torch.float32
    assert relative_error(found, exact) <= relative_error(plain, exact) + 1e-6
    gradients = [torch.autograd.grad(value.double().sum(), case.inputs) for value in (found, plain, exact)]
    slack = 1e-6 if dtype == torch.float32 else 1e-2
    for mine, other, true in zip(*gradients, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, true) <= relative_error(other, true) + slack


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slope_is_the_derivative_and_finite_everywhere(name, parameters, dtype):
    value, slope = SUMMANDS[name].value, SUMMANDS[name].slope
    logits = torch.tensor([-1e30, -200.0, -90.0, -20.0, -3.0, 0.1, 3.0, 20.0, 90.0, 200.0], dtype=dtype)
    exact = logits.double().requires_grad_()
    (derivative,) = torch.autograd.grad(value(exact, *parameters).sum(), exact)
    assert torch.allclose(slope(logits, *parameters).double(), derivative, rtol=1e-4, atol=1e-12)
    ruled_out = torch.tensor([-math.inf], dtype=dtype)
    assert value(ruled_out, *parameters) < 1e-30 and slope(ruled_out, *parameters) == 0


def test_masked_rows_and_no_rows():
    for mask in (torch.arange(37) % 3 > 0, torch.zeros(37, dtype=torch.bool)):
        for engine in ("reference", "chunked"):
            case = Case()
            found = row_statistics(
                case.hidden, case.weight, ("pointwise_sum",), pointwise="softplus", row_mask=mask, engine=engine
            ).pointwise_sum
            expected = torch.nn.functional.softplus(dense_logits(case.hidden, case.weight)).sum(-1) * mask
            assert torch.allclose(found, expected)
            (mine,) = torch.autograd.grad(found.sum(), case.hidden)
            (true,) = torch.autograd.grad(expected.sum(), case.hidden)
            assert not mine[~mask].any() and torch.allclose(mine, true)
    case = Case(rows=0)
    found = row_statistics(case.hidden, case.weight, ("pointwise_sum",), pointwise="stablemax")
    assert found.pointwise_sum.shape == (0,)


@named
def test_first_and_second_derivatives(name, parameters):
    case = Case(rows=3, classes=5, size=4)

    def function(hidden, weight, bias):
        return row_statistics(
            hidden, weight, ("pointwise_sum",), bias=bias, engine="chunked",
            pointwise=name, pointwise_parameters=parameters,
        ).pointwise_sum  # fmt: skip

    torch.autograd.gradcheck(function, case.inputs)
    if name != "stablemax":  # its second derivative jumps at 0
        torch.autograd.gradgradcheck(function, case.inputs)


def test_the_filter_leaves_it_exact():
    case = Case(dtype=torch.float32)
    gradients = []
    for eps in (None, 2**-6):
        found = row_statistics(
            case.hidden, case.weight, ("lse", "pointwise_sum"), pointwise="softplus", filter_eps=eps, engine="chunked"
        )
        gradients.append(torch.autograd.grad((found.lse + found.pointwise_sum).sum(), case.hidden)[0])
    assert torch.equal(*gradients)


def test_compiles_to_one_node():
    case = Case(dtype=torch.float32)

    def step(hidden, weight):
        found = row_statistics(
            hidden, weight, ("pointwise_sum",), pointwise="asymmetric", pointwise_parameters=(4.0, 0.05)
        )
        return found.pointwise_sum.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    sides = (case.hidden, case.weight)
    ours = torch.autograd.grad(compiled(*sides), sides)
    eager = torch.autograd.grad(step(*sides), sides)
    assert all(torch.allclose(mine, true) for mine, true in zip(ours, eager, strict=True))


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("'pointwise_sum' needs the argument pointwise=", {}),
        ("unknown pointwise 'relu'; known are softplus, stablemax, asymmetric", {"pointwise": "relu"}),
        (r"takes pointwise_parameters=\(gamma, margin\), got \(\)", {"pointwise": "asymmetric"}),
        (
            r"'softplus' takes pointwise_parameters=\(\), got \(1.0,\)",
            {"pointwise": "softplus", "pointwise_parameters": (1.0,)},
        ),
    ],
)
def test_misuse_is_named(message, wrong):
    case = Case()
    with pytest.raises(ValueError, match=message):
        row_statistics(case.hidden, case.weight, ("pointwise_sum",), **wrong)
