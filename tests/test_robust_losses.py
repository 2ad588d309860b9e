"""Losses for noisy labels beyond their definitions: what normalising gives, and temperatures that settle."""

import pytest
import torch

import xhead
from tests import dense_losses
from tests.dense import dense_logits, relative_error
from tests.dense_losses import SETTLED, cross_entropy, mae, over_all_labels, rce
from tests.test_losses import inputs, memory_share
from xhead.losses import get_loss, vectors


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nce", {}),
        ("aldr_kl", {}),
        ("apl", {}),
        ("apl", {"active": "nfl"}),
        ("apl", {"active": "ce", "passive": "nmae"}),
    ],
)
def test_normalising_one_class_is_refused(name, options):
    logits = xhead.LazyLogits(torch.randn(2, 3), torch.randn(1, 3))
    with pytest.raises(ValueError, match="two classes or more, got logits of 1 class"):
        get_loss(name, **options)(logits, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("part", "plain"), [("nfl", dense_losses.focal), ("nce", cross_entropy), ("nmae", mae), ("nrce", rce)]
)
def test_normalised_losses_sum_to_one_over_the_labels(part, plain):
    """The paper's definition as it stands: the loss by its sum over every label that the row could have."""
    hidden, weight, bias, labels = inputs(rows=7, classes=11, peak=1.0)
    active = part in ("nfl", "nce")
    options = {"active": part, "beta": 0.0} if active else {"active": "ce", "alpha": 0.0, "passive": part}
    rows = get_loss("apl", **options)(xhead.LazyLogits(hidden, weight, bias), labels)
    expected = over_all_labels(plain, dense_logits(hidden, weight, bias), labels)
    # A one-hot label's floor belongs to all labels alike: what the reverse loss adds to each is 0.
    assert relative_error(rows, expected) < 1e-12


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_normalised_focal_of_sure_rows(gamma):
    """Rows of p_y = 1 and 0 in float32 have finite values and gradients; blocks of rows give what one block gives."""
    weight = torch.eye(6).requires_grad_()
    hidden = (60.0 * torch.eye(6)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 4, 5, 3])
    rows = get_loss("apl", active="nfl", gamma=gamma, beta=0.0)(xhead.LazyLogits(hidden, weight), labels)
    assert rows.isfinite().all() and (rows[:3] == 0).all() and (rows[3:] > 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(rows.sum(), (hidden, weight)))


def test_normalised_focal_builds_a_block_of_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 1 << 18)
    assert memory_share(get_loss("apl", active="nfl"), 30_011) < 1 / 4


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_adaptive_temperatures_settle_in_few_steps(margin):
    hidden, weight, bias, labels = inputs(peak=1.0)
    logits = xhead.LazyLogits(hidden, weight, bias)
    few = get_loss("aldr_kl", margin=margin)(logits, labels)
    settled = get_loss("aldr_kl", margin=margin, **SETTLED)(logits, labels)
    assert relative_error(few, settled) < 1e-3
    fixed = get_loss("aldr_kl", margin=margin, alpha=1e9)(logits, labels)
    assert relative_error(fixed, get_loss("ldr_kl", margin=margin)(logits, labels)) < 1e-6
