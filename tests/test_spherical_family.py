"""The spherical family against its formulas on all scores, and its closed forms against autograd."""

import pytest
import torch

from tests.dense import relative_error
from tests.spherical_definitions import MEMBERS
from xhead.losses.spherical_family import FAMILY, spherical_loss

ROWS, CLASSES, TARGETS = 7, 53, 3


members = pytest.mark.parametrize(("name", "options", "definition"), MEMBERS)


def moments(scores):
    return scores.mean(-1), scores.var(-1, correction=0)


def inputs():
    scores = (torch.randn(ROWS, CLASSES, dtype=torch.float64) + 0.3).requires_grad_()
    classes = torch.stack([torch.randperm(CLASSES)[:TARGETS] for _ in range(ROWS)])
    values = torch.rand(ROWS, TARGETS, dtype=torch.float64) + 0.5
    values[0, 1:] = 0.0
    return scores, classes, values


@members
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_and_gradient_of_all_scores(name, options, definition, weighted):
    scores, classes, values = inputs()
    values = values if weighted else torch.ones_like(values)
    loss = spherical_loss(name, **options)
    rows = loss.rows(*moments(scores), scores.gather(1, classes), CLASSES, values if weighted else None)
    expected = definition(scores, torch.zeros_like(scores).scatter(1, classes, values), **options)
    assert relative_error(rows, expected) < 1e-12
    upstream = torch.randn(ROWS, dtype=torch.float64)
    ours, true = (torch.autograd.grad(each, scores, upstream)[0] for each in (rows, expected))
    assert relative_error(ours, true) < 1e-12


@members
@pytest.mark.parametrize("weighted", [False, True])
def test_closed_forms_are_the_derivatives(name, options, definition, weighted):
    scores, classes, values = inputs()
    given = values if weighted else None
    loss = spherical_loss(name, **options)
    sides = [t.detach().requires_grad_() for t in (*moments(scores), scores.gather(1, classes))]
    rows = loss.rows(*sides, CLASSES, given)
    true = torch.autograd.grad(rows.sum(), sides)
    for mine, exact in zip(loss.slopes(*sides, CLASSES, given), true, strict=True):
        assert mine.shape == exact.shape
        assert relative_error(mine, exact) < 1e-12

    sums = (scores.square().sum(-1), scores.sum(-1), scores.gather(1, classes))
    found = loss.loss_and_derivatives(*(t.detach() for t in sums), CLASSES, given)
    y = torch.zeros_like(scores).scatter(1, classes, values if weighted else torch.ones_like(values))
    expected = definition(scores, y, **options)
    dense = torch.autograd.grad(expected.sum(), scores)[0]
    explicit = torch.zeros_like(scores).scatter(1, classes, found.gamma)
    assert relative_error(found.loss, expected) < 1e-12
    assert relative_error(2 * found.alpha[:, None] * scores + found.beta[:, None] + explicit, dense) < 1e-12


@members
def test_gradcheck(name, options, definition):
    scores, classes, values = inputs()

    def function(scores):
        return spherical_loss(name, **options).rows(*moments(scores), scores.gather(1, classes), CLASSES, values)

    torch.autograd.gradcheck(function, (scores,))


def test_equal_scores_stay_finite():
    scores = torch.full((2, CLASSES), 3.0)
    loss = spherical_loss("zloss")
    found = loss.loss_and_derivatives(scores.square().sum(-1), scores.sum(-1), scores[:, :1], CLASSES)
    assert all(each.isfinite().all() for each in found)


def test_zloss_is_blind_to_scale_and_shift():
    scores, classes, _ = inputs()
    loss = spherical_loss("zloss", margin=3.0, eps=0.0)
    rows = [loss.rows(*moments(each), each.gather(1, classes), CLASSES) for each in (scores, 5 * scores - 100)]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax", {}, "unknown spherical loss 'softmax'; known are log_spherical, log_taylor, mse, zloss"),
        ("zloss", {"a": 1.0}, "unknown option a for spherical loss 'zloss'; known are sharpness, margin, eps"),
        ("mse", {"a": 1.0}, "known are none"),
        ("zloss", {"sharpness": 0.0}, "sharpness must be a finite number above 0, got 0.0"),
        ("log_spherical", {"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        spherical_loss(name, **options)


def test_every_member_is_tested():
    assert {name for name, _, _ in MEMBERS} == set(FAMILY)
