"""Losses over the pairs of a batch: each against its definition, pair by pair, in float64."""

import math

import pytest
import torch

from tests.dense import relative_error
from tests.largest import Largest
from xhead.losses import pairs, vectors

COUNT, SIZE = 23, 7


def unit(vectors):
    return vectors / (vectors * vectors).sum(-1, keepdim=True).sqrt()


def softplus(value):
    return torch.log1p(torch.exp(-value.abs())) + value.clamp(min=0)


def siglip(x, y):
    scores = 10.0 * x @ y.T - 10.0
    return torch.stack(
        [sum(softplus(-s if i == j else s) for j, s in enumerate(row)) for i, row in enumerate(scores)]
    ).mean()


def supcon(x, labels):
    scores, rows = x @ x.T / 0.07, []
    for i, row in enumerate(scores):
        others = [j for j in range(len(x)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            rows.append(row[others].logsumexp(0) - row[positives].mean())
    return torch.stack(rows).mean()


def split(scores, labels, other_labels, within):
    for i, row in enumerate(scores):
        places = range(len(row))
        same = [j for j in places if other_labels[j] == labels[i] and not (within and i == j)]
        yield row[same], row[[j for j in places if other_labels[j] != labels[i]]]


def circle(x, labels, y, other_labels, within, g=80.0, m=0.4):
    rows = []
    for p, n in split(x @ y.T, labels, other_labels, within):
        if len(p) and len(n):
            repel = (g * (n + m).clamp(min=0) * (n - m)).logsumexp(0)
            rows.append(softplus(repel + (-g * (1 + m - p).clamp(min=0) * (p - 1 + m)).logsumexp(0)))
        else:
            rows.append(x.new_zeros(()))
    return torch.stack(rows).mean()


def multi_similarity(x, labels, y, other_labels, within, a=2.0, b=50.0, t=0.5):
    rows = [
        torch.log(1 + torch.exp(-a * (p - t)).sum()) / a + torch.log(1 + torch.exp(b * (n - t)).sum()) / b
        for p, n in split(x @ y.T, labels, other_labels, within)
    ]
    return torch.stack(rows).mean()


def auc(x, y):
    scores = 3.0 * x @ y.T
    negatives = scores[~torch.eye(len(x), dtype=torch.bool)]
    return softplus(negatives[None] - scores.diag()[:, None]).mean()


def inputs(dtype=torch.float64, count=COUNT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    x[: count // 2] = y[: count // 2] + 0.1 * x[: count // 2]
    labels = torch.randint(5, (count,), generator=generator)
    labels[-1] = 99  # alone
    other_labels = torch.randint(5, (count,), generator=generator)
    other_labels[0] = 77
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), labels, other_labels


LOSSES = {
    "siglip": (lambda x, y, a, b: pairs.siglip(x, y), lambda x, y, a, b: siglip(x, y)),
    "supcon": (lambda x, y, a, b: pairs.supcon(x, a), lambda x, y, a, b: supcon(x, a)),
    "supcon, reference": (lambda x, y, a, b: pairs.supcon(x, a, engine="reference"), lambda x, y, a, b: supcon(x, a)),
    "circle": (lambda x, y, a, b: pairs.circle(x, a), lambda x, y, a, b: circle(x, a, x, a, True)),
    "circle, other": (
        lambda x, y, a, b: pairs.circle(x, a, y, b),
        lambda x, y, a, b: circle(x, a, y, b, False),
    ),
    "multi_similarity": (
        lambda x, y, a, b: pairs.multi_similarity(x, a),
        lambda x, y, a, b: multi_similarity(x, a, x, a, True),
    ),
    "multi_similarity, other": (
        lambda x, y, a, b: pairs.multi_similarity(x, a, y, b),
        lambda x, y, a, b: multi_similarity(x, a, y, b, False),
    ),
    "auc": (lambda x, y, a, b: pairs.auc(x, y, scale=3.0), lambda x, y, a, b: auc(x, y)),
}


def gradients(loss, x, y):
    return [g for g in torch.autograd.grad(loss, (x, y), allow_unused=True) if g is not None]


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name, blocks, monkeypatch):
    if blocks == "many":
        for module in (pairs, vectors):
            monkeypatch.setattr(module, "BLOCK_BYTES", 4 * COUNT * 5)
    ours, define = LOSSES[name]
    x, y, labels, other_labels = inputs()
    mine = ours(x, y, labels, other_labels)
    true = define(unit(x), unit(y), labels, other_labels)
    assert relative_error(mine, true) < 1e-9
    for found, exact in zip(gradients(mine, x, y), gradients(true, x, y), strict=True):
        assert relative_error(found, exact) < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_single_precision(name):
    ours, define = LOSSES[name]
    x, y, labels, other_labels = inputs(torch.float32)
    mine = ours(x, y, labels, other_labels)
    true = define(unit(x.double()), unit(y.double()), labels, other_labels)
    assert mine.dtype == torch.float32
    assert relative_error(mine, true) < 1e-5
    for found, exact in zip(gradients(mine, x, y), gradients(true, x, y), strict=True):
        assert relative_error(found, exact) < 2e-5  # circle multiplies what float32 rounds off a score by 80


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name):
    x, y, labels, other_labels = inputs(count=6, seed=2)
    labels = labels % 2
    assert torch.autograd.gradcheck(lambda x, y: LOSSES[name][0](x, y, labels, other_labels % 2), (x, y))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(name, count):
    x, y, labels, other_labels = (value[:count].detach() for value in inputs())
    x.requires_grad_()
    y.requires_grad_()
    loss = LOSSES[name][0](x, y, labels, other_labels)
    assert loss.isfinite()
    for gradient in gradients(loss, x, y):
        assert gradient.isfinite().all()
    if count == 0 or ("other" not in name and name != "siglip"):
        assert loss == 0


@pytest.mark.parametrize("name", [name for name in LOSSES if "reference" not in name])
def test_memory_is_that_of_a_block(name, monkeypatch):
    count = 60 if name == "auc" else 300
    block = count * count // 10
    for module in (pairs, vectors):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * block)
    x, y, labels, other_labels = inputs(count=count)
    with Largest() as seen:
        LOSSES[name][0](x, y, labels, other_labels).backward()
    assert seen.numel <= max(block, count * SIZE)


def test_scale_and_bias_of_siglip_are_trained():
    x, y, _, _ = inputs()
    log_scale = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    loss = pairs.siglip(x, y, scale=log_scale.exp(), bias=bias)
    assert torch.allclose(loss, siglip(unit(x), unit(y)))
    small = (x.detach()[:4], y.detach()[:4])
    assert torch.autograd.gradcheck(lambda s, b: pairs.siglip(*small, scale=s.exp(), bias=b), (log_scale, bias))
    rows = pairs.siglip(x, y, reduction="none")
    assert rows.shape == (COUNT,)
    assert torch.allclose(rows.mean(), loss) and torch.allclose(pairs.siglip(x, y, reduction="sum"), rows.sum())


def test_vectors_as_they_are():
    x, y, labels, _ = inputs()
    for loss, target in ((pairs.siglip, y), (pairs.auc, y), (pairs.supcon, labels), (pairs.circle, labels)):
        assert torch.allclose(loss(unit(x), unit(target) if target is y else target, normalise=False), loss(x, target))
    assert torch.allclose(pairs.auc(x, y, normalise=False, scale=3.0), auc(x, y))


def test_constant_weights_of_circle():
    x, _, labels, _ = inputs()
    full, constant = pairs.circle(x, labels), pairs.circle(x, labels, detach_weights=True)
    assert torch.equal(full, constant)
    g, m = 80.0, 0.4
    z = unit(x)
    rows = []
    for p, n in split(z @ z.T, labels, labels, True):
        if len(p):
            push, pull = (n + m).clamp(min=0).detach(), (1 + m - p).clamp(min=0).detach()
            rows.append(softplus((g * push * (n - m)).logsumexp(0) + (-g * pull * (p - 1 + m)).logsumexp(0)))
    (true,) = torch.autograd.grad(torch.stack(rows).sum() / COUNT, x)
    (mine,) = torch.autograd.grad(constant, x)
    assert relative_error(mine, true) < 1e-9


def test_auc_bounds_the_share_of_wrong_orders():
    x, y, _, _ = inputs()
    scores = unit(x) @ unit(y).T
    negatives = scores[~torch.eye(COUNT, dtype=torch.bool)]
    wrong = (negatives[None] > scores.diag()[:, None]).double().mean()
    assert wrong > 0
    assert pairs.auc(x, y, scale=50.0) / math.log(2) >= wrong


def test_a_row_without_positives_is_left_out_of_the_mean_of_supcon():
    x, _, labels, _ = inputs()
    rows = pairs.supcon(x, labels, reduction="none")
    assert rows[-1] == 0
    assert torch.allclose(pairs.supcon(x, labels), rows.sum() / (rows != 0).sum())
    alone = pairs.supcon(x, torch.arange(COUNT))
    assert alone == 0
    assert not torch.autograd.grad(alone, x)[0].any()


def test_what_is_refused():
    x, y, labels, other_labels = inputs()
    with pytest.raises(RuntimeError, match=r"one shape \(n, D\), a row a pair, got \(23, 7\) and \(22, 7\)"):
        pairs.siglip(x, y[:-1])
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got \'average\''):
        pairs.auc(x, y, reduction="average")
    with pytest.raises(RuntimeError, match=r"labels must have shape \(23,\), one a vector, got \(22,\)"):
        pairs.supcon(x, labels[:-1])
    with pytest.raises(ValueError, match="give both, or neither"):
        pairs.circle(x, labels, y)
    with pytest.raises(RuntimeError, match=r"got \(23, 7\) and \(23, 6\)"):
        pairs.circle(x, labels, y[:, :-1], other_labels)
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        pairs.supcon(x, labels, temperature=0)
    with pytest.raises(RuntimeError, match=r"vectors must be floating, of shape \(n, D\)"):
        pairs.siglip(x[0], y[0])
