"""The factored state over many steps: in float32, near singular steps, and with the parts that are rarely run."""

import pytest
import torch

from tests.dense import relative_error
from tests.spherical_definitions import MEMBERS, target_matrix
from xhead.heads import SphericalHead
from xhead.heads.spherical.conditioning import apply_step, rebalance
from xhead.heads.spherical.factored import FactoredWeight
from xhead.heads.spherical.step import FeatureStep, RowStep, row_gradients
from xhead.losses.spherical_family import Slopes, spherical_loss

SINGLE = ["mse", "zloss", "log_taylor"]


def sgd(weight, definition, hidden, classes, rate, decay=0.0):
    """A step of plain SGD on a dense float64 weight, and the gradient of W."""
    weight = weight.detach().requires_grad_()
    rows = definition(hidden.double() @ weight.T, target_matrix(classes, len(weight)))
    (gradient,) = torch.autograd.grad(rows.mean(), weight)
    return ((1 - rate * decay) * weight - rate * gradient).detach()


def run(name, rate, steps, *, classes=1000, size=24, rows=16, dtype=torch.float32, **options):
    """Errors of W and of the covariance after so many steps, and the head."""
    definition = next(each for other, _, each in MEMBERS if other == name)
    generator = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(classes, size, generator=generator, dtype=torch.float64)).to(dtype)
    head = SphericalHead(size, classes, name, weight=weight, dtype=dtype, **options)
    dense = weight.double()
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    centres = torch.randn(50, size, generator=generator)
    for _ in range(steps):
        chosen = torch.randint(50, (rows,), generator=generator)
        hidden = ((centres[chosen] + 0.5 * torch.randn(rows, size, generator=generator)) @ mixing).to(dtype)
        labels = (chosen * 17 + torch.randint(5, (rows,), generator=generator))[:, None]
        head(hidden, labels).backward()
        head.step(rate, 1e-4)
        dense = sgd(dense, definition, hidden, labels, rate, 1e-4)
    covariance = torch.cov(dense.T, correction=0)
    return relative_error(head.dense(), dense), relative_error(head.weight.covariance, covariance), head


@pytest.mark.parametrize("name", SINGLE)
def test_float32_over_600_steps(name):
    weight, covariance, _ = run(name, {"mse": 0.02, "zloss": 1.0, "log_taylor": 0.3}[name], 600)
    assert weight < 1e-5 and covariance < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_float32_over_10000_steps(name):
    weight, covariance, head = run(name, {"mse": 0.02, "zloss": 1.0, "log_taylor": 0.3}[name], 10_000)
    assert weight < 1e-5 and covariance < 1e-5
    assert relative_error(head.weight.mixing @ head.weight.inverse, torch.eye(24)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [6, 60])
@pytest.mark.parametrize("closeness", [0.0, 1e-7, 1e-3, 0.3, -0.7])
def test_steps_that_annihilate_a_direction(closeness, rows, dtype):
    """`2 lr lambda_max(H' diag(alpha) H) = 1 - closeness`, the singular learning rate, at every step."""
    head = SphericalHead(24, 300, "mse", dtype=dtype)
    dense = head.dense().double()
    definition = MEMBERS[0][2]
    for _ in range(40):
        hidden = torch.randn(rows, 24, dtype=dtype)
        labels = torch.randint(300, (rows, 1))
        head(hidden, labels).backward()
        rate = (1 - closeness) * rows / (2 * float(torch.linalg.matrix_norm(hidden.double(), 2) ** 2))
        head.step(rate)
        dense = sgd(dense, definition, hidden, labels, rate)
        assert relative_error(head.dense(), dense) < (1e-5 if dtype == torch.float32 else 1e-12)
    values = torch.linalg.svdvals(head.weight.mixing)
    assert values.min() > 0.1 and values.max() < 8.1
    assert relative_error(head.weight.covariance, torch.cov(dense.T, correction=0)) < 1e-5


def test_without_fold_a_singular_step_is_refused():
    head = SphericalHead(24, 300, "mse", fold=False, dtype=torch.float64)
    hidden, labels = torch.randn(6, 24, dtype=torch.float64), torch.arange(6)
    head(hidden, labels).backward()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    limit = 6 / (2 * float(torch.linalg.matrix_norm(hidden, 2) ** 2))
    pattern = r"eigenvalue of size 0\.0\d+; without fold=True it has to be 0\.1.*is 0\.99 at lr = .*learning rate below"
    with pytest.raises(RuntimeError, match=pattern):
        head.step(0.99 * limit)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items() if "temp" not in name)
    head.step(0.85 * limit)
    assert not torch.equal(head.weight.core, before["weight.core"])
    head(hidden, labels).backward()
    head.step(1.7 * limit)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((-1.0,), "learning_rate must be a finite number of at least 0, got -1.0"),
        ((float("nan"),), "learning_rate must be a finite number"),
        ((1.0, -0.1), "weight_decay must be a finite number of at least 0, got -0.1"),
        ((2.0, 0.5), r"learning_rate \* weight_decay must be below 1, got 2.0 \* 0.5"),
    ],
)
def test_wrong_rates_change_nothing(rates, message):
    head = SphericalHead(24, 300)
    head(torch.randn(6, 24), torch.arange(6)).backward()
    before = head.dense()
    with pytest.raises(ValueError, match=message):
        head.step(*rates)
    assert torch.equal(head.dense(), before)


def test_a_gradient_that_is_not_finite_is_refused():
    head = SphericalHead(24, 300)
    before = head.dense()
    (head(torch.randn(6, 24), torch.arange(6)) * float("inf")).backward()
    with pytest.raises(RuntimeError, match="norm is (nan|inf): the head is left as it was"):
        head.step(1.0)
    assert torch.equal(head.dense(), before)


@pytest.mark.parametrize("outside", [0, 1, 5, 20])
@pytest.mark.parametrize("value", [0.0, 1e-12, 0.3, 9.0])
def test_rebalancing_leaves_the_weight(outside, value):
    size = 24
    weight = FactoredWeight(torch.randn(300, size, dtype=torch.float64))
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for _ in range(2))
    values = torch.linspace(0.6, 1.9, size, dtype=torch.float64)
    values[:outside] = value
    weight.mixing.copy_(left @ torch.diag(values) @ right)
    weight.offset.copy_(torch.randn(size))
    before = weight.dense()
    rebalance(weight)
    assert relative_error(weight.dense(), before) < 1e-13
    assert relative_error(weight.mixing @ weight.inverse, torch.eye(size)) < 1e-13
    after = torch.linalg.svdvals(weight.mixing)
    assert after.min() > 0.5 and after.max() < 2.0


@pytest.mark.parametrize("rows", [3, 24, 70])
def test_both_forms_of_a_step_are_one(rows):
    size, classes, targets = 24, 300, 2
    states = []
    for form in (RowStep, FeatureStep):
        torch.manual_seed(1)
        weight = FactoredWeight(torch.randn(classes, size, dtype=torch.float64))
        for _ in range(3):
            hidden = torch.randn(rows, size, dtype=torch.float64)
            labels = torch.randint(classes, (rows, targets)) // 3
            slopes = Slopes(*(torch.randn(shape, dtype=torch.float64) for shape in ((rows,), (rows,), (rows, targets))))
            gradients, _ = row_gradients(weight, hidden, hidden @ weight.core, weight.target_rows(labels), slopes)
            step = form(weight, gradients)
            upper, lower = step.bounds(0.3)
            eigenvalues = step.eigenvalues(0.3)
            assert -lower - 1e-12 <= eigenvalues.min() and eigenvalues.max() <= upper + 1e-12
            apply_step(weight, step, 0.3, stabilise_every=100, refresh_every=100, fold=True)
        states.append((weight.dense(), weight.core, step.norm))
    for one, other in zip(*states, strict=True):
        assert relative_error(one, other) < 1e-10


def test_moments_come_from_the_weight_again():
    head = SphericalHead(8, 2000, "zloss", refresh_every=3)
    head.weight.core[:, :8] *= 1.5
    head.weight.mean_row.add_(0.1)
    for _ in range(3):
        head(torch.randn(4, 8), torch.arange(4)).backward()
        head.step(0.0)
    dense = head.dense()
    assert relative_error(head.weight.covariance, torch.cov(dense.T, correction=0)) < 1e-6
    assert torch.allclose(head.weight.mean_row, dense.mean(0), atol=1e-7)


def test_blocks_of_the_vocabulary_and_of_targets(monkeypatch):
    monkeypatch.setattr("xhead.heads.spherical.factored.BLOCK_NUMBERS", 100)
    head = SphericalHead(24, 301, "mse", dtype=torch.float64)
    dense = head.dense()
    hidden, labels = torch.randn(9, 24, dtype=torch.float64), torch.randint(301, (9, 5))
    head(hidden, labels).backward()
    head.step(0.5)
    expected = sgd(dense, MEMBERS[0][2], hidden, labels, 0.5)
    assert relative_error(head.dense(), expected) < 1e-12
    head.weight.fold()
    assert relative_error(head.dense(), expected) < 1e-12
    head.weight.refresh()
    assert relative_error(head.weight.covariance, torch.cov(expected.T, correction=0)) < 1e-12


def test_a_large_common_mean_costs_no_digits():
    """The variance of scores that share a mean 100 times their deviation, in float32."""
    weight = torch.randn(1000, 16) + 100.0
    head = SphericalHead(16, 1000, "zloss", weight=weight)
    hidden, labels = torch.randn(8, 16), torch.arange(8)
    scores = hidden.double() @ weight.double().T
    expected = spherical_loss("zloss").rows(
        scores.mean(1), scores.var(1, correction=0), scores[:, :8].diag()[:, None], 1000
    )
    assert relative_error(head(hidden, labels, reduction="none"), expected) < 1e-4
