"""The margin losses: each against its definition on dense cosines and angles in float64."""

import copy
import math

import pytest
import torch

import xhead
from tests.dense import relative_error
from tests.largest import Largest
from tests.tiny import tokens, twins
from xhead.losses import get_loss, vectors

ROWS, CLASSES, SIZE = 37, 601, 11
SCALE = 16.0


def unit(vectors):
    return vectors / (vectors * vectors).sum(-1, keepdim=True).sqrt()


def arc(cosine, margin):
    theta = torch.arccos(cosine)
    return torch.where(theta > math.pi - margin, cosine - margin * math.sin(margin), torch.cos(theta + margin))


def ada(cosine, norm, m=0.4, h=0.333):
    z = (h * (norm - norm.mean()) / (norm.std() + 1e-3)).clamp(-1, 1)
    return torch.cos((torch.arccos(cosine) - m * z).clamp(0, math.pi)) - (m + m * z)


def dense_rows(name, hidden, weight, labels, sub_centers=1):
    """By the formula, every cosine at hand. The norms of `hidden` are constants of AdaFace's margin."""
    hidden, weight = hidden.double(), weight.double()
    cosine = unit(hidden) @ unit(weight).T
    if name == "subcenter_arcface":
        cosine = torch.stack([cosine[:, k::3] for k in range(3)]).amax(0)
    row = torch.arange(len(labels))
    target = cosine[row, labels]
    norm = (hidden.detach() ** 2).sum(-1).sqrt().clamp(1e-3, 100)
    moved = {
        "normalised_softmax": lambda: target,
        "cosface": lambda: target - 0.35,
        "arcface": lambda: arc(target, 0.5),
        "subcenter_arcface": lambda: arc(target, 0.5),
        "adaface": lambda: ada(target, norm),
        "elasticface": lambda: arc(target, 0.5),
    }[name]()
    logits = SCALE * cosine.index_put((row, labels), moved)
    return logits.logsumexp(-1) - SCALE * moved


OPTIONS = {
    "normalised_softmax": {"filter_eps": None},
    "cosface": {},
    "arcface": {},
    "subcenter_arcface": {},
    "adaface": {},
    "elasticface": {"deviation": 0.0},
}
NAMES = list(OPTIONS)


def inputs(dtype=torch.float64, rows=ROWS, classes=CLASSES, name="arcface", seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes * (3 if name == "subcenter_arcface" else 1), SIZE, generator=generator).double()
    labels = torch.randint(classes, (rows,), generator=generator)
    own = weight[labels * (3 if name == "subcenter_arcface" else 1)]
    # Targets at all angles: near 0, in between and near pi, where the margin's other branches are.
    hidden[: rows // 3] = own[: rows // 3] + 0.05 * hidden[: rows // 3]
    hidden[rows // 3 : rows // 2] = -own[rows // 3 : rows // 2] + 0.1 * hidden[rows // 3 : rows // 2]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def loss_of(name, engine="auto", **options):
    named = {} if name == "subcenter_arcface" else {"engine": engine}
    return get_loss(name, **{"scale": SCALE, **OPTIONS[name], **named, **options})


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_gradients(name, engine):
    hidden, weight, labels = inputs(name=name)
    ours = loss_of(name, engine)(xhead.LazyLogits(hidden, weight), labels)
    defined = dense_rows(name, hidden, weight, labels)
    assert ours.shape == labels.shape
    assert relative_error(ours, defined) < 1e-9
    upstream = torch.randn(ROWS, dtype=torch.float64)
    for mine, true in zip(
        torch.autograd.grad(ours, (hidden, weight), upstream),
        torch.autograd.grad(defined, (hidden, weight), upstream),
        strict=True,
    ):
        assert relative_error(mine, true) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_single_precision(name):
    hidden, weight, labels = inputs(torch.float32, name=name)
    ours = loss_of(name, "chunked")(xhead.LazyLogits(hidden, weight), labels)
    defined = dense_rows(name, hidden, weight, labels)
    assert ours.dtype == torch.float32
    assert relative_error(ours, defined) < 1e-5
    for mine, true in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight)),
        torch.autograd.grad(defined.sum(), (hidden, weight)),
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert relative_error(mine, true) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name):
    hidden, weight, labels = inputs(rows=4, classes=5, name=name, seed=3)

    def rows(hidden, weight):
        return loss_of(name)(xhead.LazyLogits(hidden, weight), labels)

    if name == "adaface":  # the norms' part in the margin has no gradient by definition
        assert torch.autograd.gradcheck(lambda weight: rows(hidden.detach(), weight), (weight,))
    else:
        assert torch.autograd.gradcheck(rows, (hidden, weight))


@pytest.mark.parametrize("name", NAMES)
def test_extreme_directions_stay_finite(name):
    _, weight, labels = inputs(torch.float32, name=name)
    own = weight.detach()[labels * (3 if name == "subcenter_arcface" else 1)]
    for hidden in (own * 7, -own * 7, torch.zeros_like(own)):
        hidden = hidden.clone().requires_grad_()
        rows = loss_of(name, scale=64.0)(xhead.LazyLogits(hidden, weight), labels)
        assert rows.isfinite().all() and (rows >= 0).all()
        for gradient in torch.autograd.grad(rows.sum(), (hidden, weight)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do(name):
    hidden, weight, labels = inputs(name=name)
    rows = loss_of(name)(xhead.LazyLogits(hidden[:0], weight), labels[:0])
    assert rows.shape == (0,)
    rows.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    one = weight[: 3 if name == "subcenter_arcface" else 1]
    rows = loss_of(name)(xhead.LazyLogits(hidden, one), torch.zeros_like(labels))
    assert not rows.any()
    assert all(not g.any() for g in torch.autograd.grad(rows.sum(), (hidden, weight)))


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_a_block(name, monkeypatch):
    hidden, weight, labels = inputs(rows=200, name=name)
    block = 10 * weight.shape[0]
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 4 * block)
    loss = loss_of(name)
    with Largest() as seen:
        loss(xhead.LazyLogits(hidden, weight), labels).sum().backward()
    assert seen.numel <= max(block, weight.numel())
    (whole,) = torch.autograd.grad(dense_rows(name, hidden, weight, labels).sum(), weight)
    assert relative_error(weight.grad, whole) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model(name):
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    xhead.patch(model, loss=name, scale=SCALE, **OPTIONS[name])
    batch = tokens()
    labels = batch["labels"]
    if name == "subcenter_arcface":
        batch["labels"] = labels = torch.where(labels == -100, labels, labels % (plain.config.vocab_size // 3))
    kept = labels[:, 1:] != -100
    hidden = plain.model(batch["input_ids"]).last_hidden_state[:, :-1][kept]
    rows = dense_rows(name, hidden, plain.lm_head.weight, labels[:, 1:][kept])
    assert abs(model(**batch).loss - rows.mean()) < 1e-4
    assert abs(model(**batch, num_items_in_batch=5).loss - rows.sum() / 5) < 1e-4
    assert xhead.status(model).materialized == 0
    nothing = model(**{**batch, "labels": torch.full_like(labels, -100)}, num_items_in_batch=5).loss
    nothing.backward()
    assert nothing == 0 and not model.lm_head.weight.grad.any()


def test_rows_that_do_not_count():
    hidden, weight, labels = inputs()
    kept = torch.rand(ROWS) < 0.5
    logits = xhead.LazyLogits(hidden, weight)
    logits._row_mask = kept
    for name in ("cosface", "adaface"):
        rows = loss_of(name)(logits, labels.masked_fill(~kept, 0))
        alone = loss_of(name)(xhead.LazyLogits(hidden[kept], weight), labels[kept])
        assert torch.allclose(rows[kept], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    hidden, weight, labels = inputs(dtype)
    rows = loss_of("arcface")(xhead.LazyLogits(hidden, weight), labels)
    assert rows.dtype == torch.float32
    assert relative_error(rows, dense_rows("arcface", hidden, weight, labels)) < 1e-5
    assert torch.autograd.grad(rows.sum(), weight)[0].dtype == dtype
    hidden, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        rows = loss_of("arcface")(xhead.LazyLogits(hidden, weight), labels)
    assert relative_error(rows, dense_rows("arcface", hidden.to(dtype), weight.to(dtype), labels)) < 1e-5


def test_arcface_without_the_margins_derivative():
    hidden, weight, labels = inputs()
    logits = xhead.LazyLogits(hidden, weight)
    exact, published = loss_of("arcface"), loss_of("arcface", exact_grad=False)
    assert torch.equal(exact(logits, labels), published(logits, labels))
    cosine = unit(hidden) @ unit(weight).T
    target = cosine[range(ROWS), labels]
    moved = SCALE * cosine.index_put((torch.arange(ROWS), labels), arc(target, 0.5))
    residual = moved.softmax(-1).detach()
    residual[range(ROWS), labels] -= 1
    (true,) = torch.autograd.grad(SCALE * (residual * cosine).sum(), hidden)
    (mine,) = torch.autograd.grad(published(logits, labels).sum(), hidden)
    assert relative_error(mine, true) < 1e-9


def test_adaface_remembers_norms():
    hidden, weight, labels = inputs()
    loss = loss_of("adaface", rate=0.25)
    mean = deviation = None
    for step in range(3):
        scaled = hidden.detach() * (1 + step)
        norm = scaled.norm(dim=-1)
        old = (mean, deviation)
        mean = norm.mean() if mean is None else 0.75 * old[0] + 0.25 * norm.mean()
        deviation = norm.std() if deviation is None else 0.75 * old[1] + 0.25 * norm.std()
        loss(xhead.LazyLogits(scaled, weight), labels)
        assert torch.allclose(loss.config.norms.moments, torch.stack([mean, deviation]))
    before = loss.config.norms.moments
    with torch.no_grad():
        loss(xhead.LazyLogits(hidden, weight), labels)
    assert loss.config.norms.moments is before
    again = copy.deepcopy(loss)
    again(xhead.LazyLogits(hidden, weight), labels)
    assert loss.config.norms.moments is before
    assert loss_of("adaface")(xhead.LazyLogits(hidden[:1], weight), labels[:1]).isfinite()


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface_draws(kind):
    hidden, weight, labels = inputs()
    logits = xhead.LazyLogits(hidden, weight)
    loss = loss_of("elasticface", kind=kind, deviation=0.1, seed=5)
    first, second = loss(logits, labels), loss(logits, labels)
    assert not torch.equal(first, second)
    assert torch.equal(first, loss_of("elasticface", kind=kind, deviation=0.1, seed=5)(logits, labels))
    assert torch.equal(*(torch.manual_seed(1) and loss_of("elasticface", kind=kind)(logits, labels) for _ in range(2)))
    mean = {"arc": 0.5, "cos": 0.35}[kind]
    margin = torch.empty(ROWS).double().normal_(mean, 0.1, generator=torch.Generator().manual_seed(5))
    cosine = unit(hidden) @ unit(weight).T
    target = cosine[range(ROWS), labels]
    for plus, found in ((False, first), (True, loss_of("elasticface", kind=kind, deviation=0.1, seed=5, plus=True))):
        if plus:
            found = found(logits, labels)
            margin = margin.sort().values[target.argsort(descending=True).argsort()]
        moved = target - margin
        if kind == "arc":
            moved = torch.stack([arc(c, float(m)) for c, m in zip(target, margin, strict=True)])
        scaled = SCALE * cosine.index_put((torch.arange(ROWS), labels), moved)
        assert relative_error(found, scaled.logsumexp(-1) - SCALE * moved) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_the_classes(name):
    hidden, weight, labels = inputs(name=name)
    logits = xhead.LazyLogits(hidden, weight)
    loss = loss_of(name, class_sample=0.2, seed=1)
    rows = loss(logits, labels)
    (gradient,) = torch.autograd.grad(rows.sum(), weight)
    touched = gradient.any(-1)
    per_class = 3 if name == "subcenter_arcface" else 1
    if per_class == 1:
        assert touched.sum() == round(0.2 * CLASSES) and touched[labels].all()
        chosen = touched.nonzero().squeeze(1)
        places = torch.searchsorted(chosen, labels)
        assert relative_error(rows, dense_rows(name, hidden, weight[chosen], places)) < 1e-9
    whole = loss_of(name)(logits, labels)
    assert (rows <= whole + 1e-12).all()
    positives_only = loss_of(name, class_sample=1e-9)(logits, labels)
    (gradient,) = torch.autograd.grad(positives_only.sum(), weight)
    touched = gradient.unflatten(0, (-1, per_class)).any(-1).any(-1)
    assert set(touched.nonzero().flatten().tolist()) <= set(labels.tolist())


def test_what_is_refused():
    hidden, weight, labels = inputs(torch.float32)
    for wrong, match in (
        ({"margin": -0.1}, "margin must be between 0 and"),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
        ({"class_sample": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"margins": 0.1}, "unknown option margins for loss 'arcface'; known are scale, class_sample, seed, engine"),
    ):
        with pytest.raises(ValueError, match=match):
            get_loss("arcface", **wrong)
    for name, wrong, match in (
        ("elasticface", {"kind": "ark"}, '"arc" or "cos", got \'ark\''),
        ("elasticface", {"deviation": -1.0}, "deviation must be"),
        ("adaface", {"rate": 0.0}, r"rate must be in \(0, 1\]"),
        ("subcenter_arcface", {"sub_centers": 0}, "sub_centers must be"),
        ("subcenter_arcface", {"engine": "chunked"}, 'engine must be "auto"'),
        ("normalised_softmax", {"filter_eps": 2.0}, "filter_eps must be"),
    ):
        with pytest.raises(ValueError, match=match):
            get_loss(name, **wrong)
    loss = get_loss("arcface")
    for logits in (
        xhead.LazyLogits(hidden, weight, torch.zeros(CLASSES)),
        xhead.LazyLogits(hidden, weight, softcap=30.0),
        xhead.LazyLogits(hidden, weight, scale=-1.0),
    ):
        with pytest.raises(ValueError, match="no bias and no softcap, got"):
            loss(logits, labels)
    with pytest.raises(IndexError, match=f"target {CLASSES} is out of bounds"):
        loss(xhead.LazyLogits(hidden, weight), labels.fill_(CLASSES))
    with pytest.raises(ValueError, match="sub_centers=3 rows a class do not divide the 601 rows"):
        get_loss("subcenter_arcface")(xhead.LazyLogits(hidden, weight), labels)
    with pytest.raises(ValueError, match="unknown engine"):
        get_loss("arcface", engine="quick")(xhead.LazyLogits(hidden, weight), labels.fill_(0))


def test_a_positive_scale_makes_no_difference():
    hidden, weight, labels = inputs()
    loss = get_loss("cosface")
    assert torch.allclose(
        loss(xhead.LazyLogits(hidden, weight, scale=0.125), labels), loss(xhead.LazyLogits(hidden, weight), labels)
    )


def test_a_low_rank_adapter_on_the_head_is_refused():
    class Low(torch.nn.Linear):
        def consume(self, hidden, function):
            return function(hidden, self.weight, self.bias)

        def trains(self):
            return True

    def lazy(size):
        layer = Low(size, 20, bias=False)
        return xhead.LazyLogits.deferred(torch.randn(4, size), layer, xhead.standin.Record(loss=get_loss("arcface")))

    with pytest.raises(ValueError, match="low-rank adapter on the output projection"):
        torch.nn.functional.cross_entropy(lazy(8) + lazy(2) * 0.5, torch.zeros(4, dtype=torch.int64))
