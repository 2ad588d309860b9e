"""Gradients through the row statistics, unusual inputs, and misuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dense import dense_logits
from tests.statistic_case import CLOSED, Case, check
from xhead import LazyLogits
from xhead.statistics import row_statistics


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_side_gets_no_gradient_and_costs_no_product(frozen, monkeypatch):
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    products = []
    addmm = torch.Tensor.addmm_

    def counted(out, *arguments, **keywords):
        products.append(tuple(out.shape))
        return addmm(out, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "addmm_", counted)
    case.found(("lse",), filter_eps=None, engine="chunked")["lse"].sum().backward()
    assert getattr(case, frozen).grad is None
    assert all(t.grad is not None for t in case.inputs if t.requires_grad)
    assert ((37, 19) in products) == (frozen != "hidden")
    assert ((301, 19) in products) == (frozen != "weight")


def test_backward_twice_over_a_retained_graph():
    case = Case()
    lse = case.found(("lse", "variance"))
    total = lse["lse"].sum() + lse["variance"].sum()
    first = torch.autograd.grad(total, case.inputs, retain_graph=True)
    second = torch.autograd.grad(total, case.inputs)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("engine", ["chunked", "gram"])
def test_second_derivatives(engine):
    case = Case(rows=3, classes=5, size=4)
    names = CLOSED if engine == "gram" else ("lse", "target", "entropy", "expectation", "complement_lse", "mean")

    def function(hidden, weight, bias):
        statistics = row_statistics(
            hidden, weight, names, bias=bias, engine=engine, scale=0.8, filter_eps=None, **case.arguments(names)
        )
        return tuple(getattr(statistics, name) for name in names)

    case.columns = torch.tensor([[0, 1], [2, -1], [4, 3]])
    torch.autograd.gradcheck(function, case.inputs)
    torch.autograd.gradgradcheck(function, case.inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hidden_gives_nan(value):
    case = Case(dtype=torch.float32)
    with torch.no_grad():
        case.hidden[4, 2] = value
    for eps in (None, 2**-8):
        found = case.found(("lse", "target"), filter_eps=eps)
        assert found["lse"][4].isnan()
        assert found["lse"][:4].isfinite().all()
        hidden_grad = case.gradients(found)[0]
        assert hidden_grad[4].isnan().any()


def test_a_class_that_is_ruled_out():
    """A bias of -inf takes a class out without NaN in values or gradients."""
    case = Case()
    with torch.no_grad():
        case.bias[[3, 260]] = float("-inf")
    names = ("lse", "entropy", "max", "argmax")
    found = case.found(names, filter_eps=None)
    logits = dense_logits(case.hidden, case.weight, case.bias)
    keep = torch.ones(301, dtype=torch.bool)
    keep[[3, 260]] = False
    assert torch.allclose(found["lse"], logits[:, keep].logsumexp(-1))
    assert torch.allclose(found["entropy"], torch.distributions.Categorical(logits=logits[:, keep]).entropy())
    assert all(gradient.isfinite().all() for gradient in case.gradients(found))


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40),
    classes=st.integers(1, 600),
    size=st.integers(1, 24),
    seed=st.integers(0, 1000),
    peak=st.sampled_from([0.01, 1.0, 30.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
)
def test_lse_and_target_whatever_the_sizes(rows, classes, size, seed, peak, softcap):
    case = Case(rows, classes, size, seed=seed, peak=peak)
    check(case, ("lse", "target", "entropy", "max"), "chunked", softcap=softcap, floor=1.0)


BAD = [
    (RuntimeError, "hidden must be .* D = 19", {"hidden": torch.zeros(3, 18, dtype=torch.float64)}),
    (RuntimeError, "same floating dtype.*float32.*float64", {"hidden": torch.zeros(3, 19)}),
    (RuntimeError, "weight must be 2-D", {"weight": torch.zeros(19, dtype=torch.float64)}),
    (RuntimeError, "weight has no rows", {"weight": torch.zeros(0, 19, dtype=torch.float64)}),
    (RuntimeError, r"bias must have shape \(301,\)", {"bias": torch.zeros(300, dtype=torch.float64)}),
    (ValueError, "unknown statistic 'lsee'; known are lse", {"names": ("lsee",)}),
    (ValueError, "no statistic was asked for", {"names": ()}),
    (ValueError, "'target' needs the argument target=", {"names": ("target",)}),
    (ValueError, "'expectation' needs the argument values=", {"names": ("expectation",)}),
    (IndexError, "target 301 is out of bounds: classes are 0 to 300", {"target": torch.full((37,), 301)}),
    (IndexError, "target -1 is out of bounds", {"target": torch.full((37,), -1)}),
    (RuntimeError, "Long or Byte.*int32.*target.long", {"target": torch.zeros(37, dtype=torch.int32)}),
    (ValueError, r"target must have shape \(37,\).*\(36,\)", {"target": torch.zeros(36, dtype=torch.int64)}),
    (RuntimeError, r"probabilities must have shape \(37, 301\)", {"target": torch.zeros(37, 300)}),
    (RuntimeError, r"values must be \(301,\)", {"values": torch.zeros(300)}),
    (RuntimeError, "values must not require", {"values": torch.zeros(301, requires_grad=True)}),
    (IndexError, "column 400 is out of bounds", {"columns": torch.full((37, 1), 400)}),
    (RuntimeError, "columns must be integers", {"columns": torch.zeros(37, 1)}),
    (RuntimeError, "mean_weight must have shape", {"mean_weight": torch.zeros(3)}),
    (ValueError, "softcap must be a positive number or None, got 0.0", {"softcap": 0.0}),
    (ValueError, 'filter_eps must be "auto", None or a number', {"filter_eps": "fast"}),
    (ValueError, 'filter_eps must be "auto", None or a number', {"filter_eps": 1.5}),
    (ValueError, "unknown engine 'cuda'; known are", {"engine": "cuda"}),
]


@pytest.mark.parametrize(("error", "message", "wrong"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_misuse_is_named(error, message, wrong):
    case = Case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "names": ("lse",), "bias": case.bias} | wrong
    with pytest.raises(error, match=message):
        row_statistics(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("names"), **arguments)


def test_lazy_logits_give_the_same():
    case = Case()
    logits = LazyLogits(case.hidden, case.weight, case.bias, softcap=4.0, scale=0.5)
    found = logits.statistics("lse", "target", target=case.target)
    defined = case.defined(("lse", "target"), softcap=4.0, scale=0.5)
    assert torch.allclose(found.lse, defined["lse"]) and torch.allclose(found.target, defined["target"])
    assert found.mean is None
    assert torch.allclose(logits.materialize(), dense_logits(case.hidden, case.weight, case.bias, 0.5, 4.0))
