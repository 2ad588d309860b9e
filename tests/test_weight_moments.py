"""The Gram matrix that is kept between calls: never that of another weight, however the weight was changed."""

import pytest
import torch
from torch import nn

import xhead
from tests.dense import dense_logits, relative_error
from xhead.engines import weight_moments
from xhead.statistics import row_statistics

ROWS, CLASSES, SIZE = 40, 613, 9


@pytest.fixture(autouse=True)
def _empty():
    weight_moments.clear()


@pytest.fixture
def made(monkeypatch):
    """One entry for each Gram matrix that is made."""
    calls, scatter = [], weight_moments.scatter
    monkeypatch.setattr(weight_moments, "scatter", lambda *arguments: calls.append(1) or scatter(*arguments))
    return calls


def layer(dtype=torch.float64, bias=True):
    return nn.Linear(SIZE, CLASSES, bias=bias, dtype=dtype)


def variance(linear, hidden):
    found = row_statistics(hidden, linear.weight, ("variance", "mean"), bias=linear.bias, engine="gram")
    return found.variance


def check(linear, hidden, tolerance=1e-9):
    exact = dense_logits(hidden, linear.weight, linear.bias).var(-1, correction=0)
    assert relative_error(variance(linear, hidden), exact) < tolerance


def step_of_sgd(linear):
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    linear(torch.randn(3, SIZE, dtype=linear.weight.dtype)).square().sum().backward()
    optimizer.step()


def swap_data(linear):
    linear.weight.data = torch.randn(CLASSES, SIZE, dtype=linear.weight.dtype)


def swap_data_to_a_used_address(linear):
    for _ in range(4):
        linear.weight.data = torch.randn(CLASSES, SIZE, dtype=linear.weight.dtype)


def in_place_with_version(linear):
    with torch.no_grad():
        linear.weight.mul_(1.001)


def in_place_without_version(linear):
    version = linear.weight._version
    linear.weight.data.mul_(1.001)
    assert linear.weight._version == version


def one_number_without_version(linear):
    linear.weight.data[CLASSES // 2, 3] += 0.05


def opposite_changes_of_two_rows(linear):
    """The mean row stays as it is."""
    linear.weight.data[5] += 1
    linear.weight.data[300] -= 1


def through_numpy(linear):
    linear.weight.detach().numpy()[17] = 0.25


def one_bias(linear):
    linear.bias.data[7] += 1.0


CHANGES = [
    step_of_sgd,
    lambda linear: linear.load_state_dict(layer(linear.weight.dtype).state_dict()),
    swap_data,
    swap_data_to_a_used_address,
    in_place_with_version,
    in_place_without_version,
    one_number_without_version,
    opposite_changes_of_two_rows,
    through_numpy,
    one_bias,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_change_is_noticed(change, dtype, made):
    linear, hidden = layer(dtype), torch.randn(ROWS, SIZE, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for _ in range(2):
        check(linear, hidden, tolerance)
    assert len(made) == 1
    change(linear)
    for _ in range(2):
        check(linear, hidden, tolerance)
    assert len(made) == 2


@pytest.mark.parametrize(("dtype", "change"), [(torch.bfloat16, 2**-7), (torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_a_small_change_of_one_number_is_noticed(dtype, change, made):
    """In half precision the last bit: contents are compared in float32."""
    linear, hidden = layer(dtype), torch.randn(ROWS, SIZE, dtype=dtype)
    variance(linear, hidden)
    linear.weight.data[100, 2] = 0.25
    variance(linear, hidden)
    linear.weight.data[100, 2] *= 1 + change
    variance(linear, hidden)
    assert len(made) == 3


def test_copies_of_a_weight_share_one(made):
    linear, hidden = layer(torch.float32), torch.randn(ROWS, SIZE)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            variance(linear, hidden)
    assert len(made) == 1


def test_training_and_evaluation_share_one(made):
    linear, hidden = layer(), torch.randn(ROWS, SIZE, dtype=torch.float64)
    with torch.inference_mode():
        variance(linear, hidden)
    variance(linear, hidden).sum().backward()
    with torch.no_grad():
        variance(linear, hidden)
    assert len(made) == 1
    expected = torch.autograd.grad(
        dense_logits(hidden, linear.weight, linear.bias).var(-1, correction=0).sum(), linear.weight
    )
    assert relative_error(linear.weight.grad, expected[0]) < 1e-9


def test_two_weights_in_turn_are_both_kept(made):
    first, second, hidden = layer(), layer(), torch.randn(ROWS, SIZE, dtype=torch.float64)
    for _ in range(3):
        check(first, hidden)
        check(second, hidden)
    assert len(made) == 2
    for _ in range(3):
        check(layer(), hidden)
    assert len(weight_moments._entries) == 2


def test_what_a_call_gets_is_its_own(made):
    linear, hidden = layer(), torch.randn(ROWS, SIZE, dtype=torch.float64)
    problem = xhead.statistics.Problem(hidden, linear.weight.detach(), ("variance",), linear.bias.detach())
    for _ in range(2):
        centre, gram = weight_moments.centred_gram(problem)
        centre.zero_()
        gram.zero_()
    assert len(made) == 1
    check(linear, hidden)
