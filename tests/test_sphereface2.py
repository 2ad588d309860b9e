"""SphereFace2 against its definition on dense cosines in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import xhead
from tests.dense import relative_error
from tests.test_margins import inputs, unit
from tests.tiny import tokens, twins
from xhead.losses import get_loss

OPTIONS = [
    {},
    {"scale": 16.0, "margin": 0.2, "power": 1.0, "balance": 0.4, "offset": -3.0},
    {"power": 2.5, "scale": 8.0},
]


def g(cosine, power):
    return 2 * ((cosine + 1) / 2) ** power - 1


def definition(hidden, weight, labels, scale=40.0, margin=0.4, power=3.0, balance=0.7, factor=50.0, offset=None):
    cosine = unit(hidden.double()) @ unit(weight.double()).T
    classes = weight.shape[0]
    if offset is None:
        offset = balanced(scale, margin, power, balance, classes)
    own = F.one_hot(labels, classes).bool()
    right = F.softplus(-(scale * (g(cosine, power) - margin) + offset), threshold=math.inf)
    wrong = F.softplus(scale * (g(cosine, power) + margin) + offset, threshold=math.inf)
    return factor / scale * torch.where(own, balance * right, (1 - balance) * wrong).sum(1)


def balanced(scale, margin, power, balance, classes):
    """By bisection: what the right class and all wrong ones pull with, at cosine 0."""
    low, high = -500.0, 500.0
    for _ in range(200):
        offset = torch.tensor((low + high) / 2, dtype=torch.float64)
        pull = balance * torch.sigmoid(-(scale * (g(0.0, power) - margin) + offset))
        push = (1 - balance) * (classes - 1) * torch.sigmoid(scale * (g(0.0, power) + margin) + offset)
        low, high = (float(offset), high) if pull > push else (low, float(offset))
    return float(offset)


@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "given", "fractional"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_and_gradients(options, dtype):
    hidden, weight, labels = inputs(dtype)
    exact = definition(hidden, weight, labels, **options)
    upstream = torch.randn(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    true = torch.autograd.grad(exact, (hidden, weight), upstream)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for engine in ("reference", "chunked") if dtype == torch.float64 else ("chunked",):
        rows = get_loss("sphereface2", engine=engine, **options)(xhead.LazyLogits(hidden, weight), labels)
        assert rows.dtype == dtype and relative_error(rows, exact) < tolerance
        ours = torch.autograd.grad(rows, (hidden, weight), upstream.to(dtype))
        assert all(relative_error(*pair) < tolerance for pair in zip(ours, true, strict=True))


@pytest.mark.parametrize("power", [1.0, 2.5, 3.0])
def test_derivatives(power):
    generator = torch.Generator().manual_seed(2)
    sides = [torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 5)]
    loss = get_loss("sphereface2", scale=4.0, power=power, engine="chunked")
    torch.autograd.gradcheck(lambda h, w: loss(xhead.LazyLogits(h, w), torch.tensor([1, 4, 0])), sides)


def test_opposite_and_equal_directions_are_finite():
    weight = torch.cat([torch.eye(3), -torch.eye(3)]).requires_grad_()
    hidden = torch.cat([torch.eye(3), torch.eye(3)]).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    rows = get_loss("sphereface2", power=1.5)(xhead.LazyLogits(hidden, weight), labels)
    assert rows.isfinite().all() and (rows[:3] < rows[3:]).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(rows.sum(), (hidden, weight)))


def test_empty_ignored_and_sampled():
    hidden, weight, labels = inputs()
    loss = get_loss("sphereface2")
    empty = loss(xhead.LazyLogits(hidden[:0], weight), labels[:0])
    assert empty.shape == (0,) and not torch.autograd.grad(empty.sum(), weight)[0].any()
    sampled = get_loss("sphereface2", class_sample=0.2, seed=3)(xhead.LazyLogits(hidden, weight), labels)
    touched = torch.autograd.grad(sampled.sum(), weight)[0].any(1)
    assert int(touched.sum()) == round(0.2 * len(weight)) and touched[labels].all()


def test_patched_model():
    plain, patched = twins("LlamaForCausalLM")
    xhead.patch(patched, loss="sphereface2")
    batch = tokens()
    patched(**batch).loss.backward()
    status = xhead.status(patched)
    assert (status.cut, status.materialized) == (1, 0)
    states = plain.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    kept = labels != -100
    definition(states[kept], plain.lm_head.weight, labels[kept]).mean().backward()
    for mine, exact in zip(patched.parameters(), plain.parameters(), strict=True):
        assert relative_error(mine.grad, exact.grad, 1e-4) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "margin must be"),
        ({"power": 0.5}, "power must be a finite number of at least 1, got 0.5"),
        ({"balance": 1.0}, r"balance must be a share in \(0, 1\), both left out, got 1.0"),
        ({"factor": 0.0}, "factor must be a finite number above 0, got 0.0"),
        ({"offset": math.nan}, "offset must be a finite number, got nan"),
        ({"gamma": 1.0}, "unknown option gamma for loss 'sphereface2'; known are .*margin, power, balance"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        get_loss("sphereface2", **options)
