"""What sets the spherical losses apart: no pass over N x V, nearly constant logits, several labels, probabilities."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import xhead
from benchmarks.measure import peak_allocated
from tests.dense import dense_logits, relative_error
from tests.dense_losses import log_spherical, log_taylor, zloss
from tests.test_losses import CLASSES, ROWS, inputs
from tests.tiny import tiny, tokens
from xhead import engines
from xhead.engines import chunked
from xhead.engines.problem import Problem
from xhead.losses import get_loss
from xhead.losses.spherical import log_probability

ALL = {
    "zloss": zloss,
    "log_taylor": log_taylor,
    "log_spherical": log_spherical,
    "mse": lambda o, y: (o - F.one_hot(y, o.shape[-1]).to(o.dtype)).square().sum(-1),
}
each = pytest.mark.parametrize("name", ALL)


def several_labels(classes):
    """Padded class indices with a repeat, an empty row; the same sets as sparse CSR, and as zeros and ones."""
    padded = torch.randint(-1, classes, (ROWS, 4))
    padded[:, 2] = padded[:, 1]
    padded[7] = -1
    right = torch.zeros(ROWS, classes + 1, dtype=torch.float64).scatter_(1, padded % (classes + 1), 1.0)[:, :classes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta, PyTorch says
        return padded, right.to_sparse_csr(), right


@pytest.mark.parametrize("form", [{}, {"scale": 0.7, "softcap": 4.0}], ids=["linear", "capped"])
@each
def test_several_labels(name, form):
    classes = 211
    *sides, _ = inputs(classes=classes)
    padded, sparse, right = several_labels(classes)
    logits = dense_logits(*sides, **form)
    if name == "mse":
        expected = (logits - right).square().sum(-1)
    else:
        every = torch.stack([ALL[name](logits, torch.full((ROWS,), k)) for k in range(classes)], -1)
        expected = (every * right).sum(-1)
    upstream = torch.randn(ROWS, dtype=torch.float64)
    true = torch.autograd.grad(expected, sides, upstream)
    for labels in (padded, sparse):
        rows = get_loss(name)(xhead.LazyLogits(*sides, **form), labels)
        assert relative_error(rows, expected) < 1e-9
        ours = torch.autograd.grad(rows, sides, upstream)
        assert all(relative_error(mine, exact) < 1e-9 for mine, exact in zip(ours, true, strict=True))
    assert name == "mse" or rows[7] == 0


@each
def test_no_labels_at_all(name):
    *sides, _ = inputs()
    rows = get_loss(name)(xhead.LazyLogits(*sides), torch.full((ROWS, 2), -1))
    exact = dense_logits(*sides).square().sum(-1) if name == "mse" else torch.zeros(ROWS)
    assert relative_error(rows, exact) < 1e-9
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(rows.sum(), sides))
    empty = get_loss(name)(xhead.LazyLogits(sides[0][:0], *sides[1:]), torch.empty(0, 3, dtype=torch.int64))
    assert empty.shape == (0,)


@each
def test_labels_of_another_shape_are_refused(name):
    *sides, _ = inputs()
    with pytest.raises(RuntimeError, match=r"labels must be int64 of shape \(41,\) or \(41, K\)"):
        get_loss(name)(xhead.LazyLogits(*sides), torch.zeros(ROWS - 1, 2, dtype=torch.int64))
    with pytest.raises(IndexError, match="1031 is out of bounds"):
        get_loss(name)(xhead.LazyLogits(*sides), torch.full((ROWS, 1), CLASSES))


@pytest.mark.parametrize("engine", ["gram", "chunked"])
def test_nearly_constant_logits_in_float32(engine):
    """All rows of the weight share a mean a thousand times their deviation: E[o^2] - E[o]^2 has no digits left."""
    hidden, weight, _, labels = inputs(torch.float32, rows=600)
    with torch.no_grad():
        weight += 1000.0
    exact = zloss(dense_logits(hidden, weight), labels, b=2.0)
    rows = get_loss("zloss", b=2.0, engine=engine)(xhead.LazyLogits(hidden, weight), labels)
    assert relative_error(rows, exact) < 1e-2
    logits = (hidden @ weight.T).detach()
    variance = logits.square().mean(-1) - logits.mean(-1).square()
    naive = F.softplus(2 - (logits.gather(1, labels[:, None])[:, 0] - logits.mean(-1)) * variance.abs().rsqrt())
    assert relative_error(naive, exact) > 0.1
    ours = torch.autograd.grad(rows.sum(), hidden)[0]
    assert relative_error(ours, torch.autograd.grad(exact.sum(), hidden)[0]) < 0.05


def test_constant_logits_are_finite():
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.zeros(50, 3, requires_grad=True)
    rows = get_loss("zloss")(xhead.LazyLogits(hidden, weight), torch.arange(5))
    assert torch.allclose(rows, torch.full((5,), math.log(2)))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(rows.sum(), (hidden, weight)))


def test_the_zloss_sees_neither_scale_nor_shift():
    hidden, weight, bias, labels = inputs()
    loss = get_loss("zloss", a=0.3, b=3.0)
    rows = loss(xhead.LazyLogits(hidden, weight, bias), labels)
    moved = loss(xhead.LazyLogits(hidden, 2.5 * weight, 2.5 * bias + 4), labels)
    assert relative_error(moved, rows) < 1e-9
    best = torch.zeros(1, CLASSES, dtype=torch.float64)
    best[0, 3] = 1.0
    least = loss(xhead.LazyLogits(torch.ones(1, 1, dtype=torch.float64), best.T), torch.tensor([3]))
    assert abs(least.item() - math.log1p(math.exp(0.3 * (3 - math.sqrt(CLASSES - 1)))) / 0.3) < 1e-9


@each
def test_many_rows_meet_no_logits(name, monkeypatch):
    """Nor does memory grow with the rows times the classes."""
    monkeypatch.setattr(chunked, "forward", None)
    hidden, weight, _, labels = inputs(torch.float32, rows=2000, classes=4001, size=8)

    def step():
        get_loss(name)(xhead.LazyLogits(hidden, weight), labels).sum().backward()

    _, beyond = peak_allocated(step, lambda: (hidden.grad, weight.grad))
    assert beyond < 2000 * 4001 * 4 / 30


@pytest.mark.parametrize(
    ("rows", "classes", "size", "chosen"),
    [
        (2048, 50_000, 768, "gram"),
        (512, 50_000, 768, "gram"),
        (256, 50_000, 768, "chunked"),
        (1, 50_000, 768, "chunked"),
        (40, 1000, 13, "gram"),
        (100_000, 100, 768, "chunked"),  # a weight with fewer classes than dimensions
    ],
)
def test_auto_takes_the_cheaper_engine(rows, classes, size, chosen):
    hidden, weight = torch.empty(rows, size, device="meta"), torch.empty(classes, size, device="meta")
    problem = Problem(hidden, weight, ("mean", "variance", "target"), target=torch.empty(rows, device="meta").long())
    assert engines.select("auto", problem) == chosen
    closed = size * (2 * classes + 3 * rows) <= 4 * rows * classes
    assert (chosen == "gram") == closed
    assert engines.select("auto", problem.having(("mean", "target"))) == "gram"


@pytest.mark.parametrize("rows", [3, 40])
@each
def test_the_engines_agree(name, rows):
    """Few rows beside D go through tiles, many through the Gram matrix, whatever is named."""
    hidden, weight, bias, labels = inputs(rows=rows, classes=301, size=19)
    upstream = torch.randn(rows, dtype=torch.float64)
    exact = ALL[name](dense_logits(hidden, weight, bias), labels)
    true = torch.autograd.grad(exact, (hidden, weight, bias), upstream)
    for engine in ("auto", "gram", "chunked", "reference"):
        found = get_loss(name, engine=engine)(xhead.LazyLogits(hidden, weight, bias), labels)
        assert relative_error(found, exact) < 1e-9
        ours = torch.autograd.grad(found, (hidden, weight, bias), upstream)
        assert all(relative_error(mine, other) < 1e-9 for mine, other in zip(ours, true, strict=True))


def test_small_batches_go_through_tiles_beside_gathered_sets():
    hidden, weight, bias, _ = inputs(rows=3, classes=301, size=19)
    logits = dense_logits(hidden, weight, bias)
    sets = torch.tensor([[1, 5], [300, -1], [2, 3]])
    found = xhead.LazyLogits(hidden, weight, bias).statistics("variance", "subset_lse", "mean", columns=sets)
    assert relative_error(found.variance, logits.var(-1, correction=0)) < 1e-9
    assert relative_error(found.subset_lse[0], logits[0, [1, 5]].logsumexp(0)) < 1e-9
    expected = logits.var(-1, correction=0) + logits.mean(-1)
    expected = expected.sum() + logits[0, [1, 5]].logsumexp(0) + logits[1, 300] + logits[2, [2, 3]].logsumexp(0)
    total = (found.variance + found.subset_lse + found.mean).sum()
    pairs = zip(*(torch.autograd.grad(each, (hidden, weight, bias)) for each in (total, expected)), strict=True)
    assert all(relative_error(mine, exact) < 1e-9 for mine, exact in pairs)


@pytest.mark.parametrize(("name", "options"), [("log_taylor", {}), ("log_spherical", {"eps": 0.1})])
def test_log_probability(name, options):
    hidden, weight, bias, labels = inputs()
    logits, lazy = dense_logits(hidden, weight, bias), xhead.LazyLogits(hidden, weight, bias)
    numerator = 1 + logits + logits.square() / 2 if name == "log_taylor" else logits.square() + 0.1
    exact = (numerator / numerator.sum(-1, keepdim=True)).log()
    classes = torch.randint(CLASSES, (ROWS, 3))
    assert relative_error(log_probability(lazy, classes, name, **options), exact.gather(1, classes)) < 1e-9
    one = log_probability(lazy, labels, name, **options)
    assert relative_error(-one, get_loss(name, **options)(lazy, labels)) < 1e-9
    every = log_probability(lazy, torch.arange(CLASSES).expand(ROWS, -1), name, **options)
    assert torch.allclose(every.exp().sum(-1), torch.ones(ROWS, dtype=torch.float64))


def test_log_probability_of_what_has_none():
    lazy = xhead.LazyLogits(torch.randn(2, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match='"log_taylor" or "log_spherical".*got \'zloss\''):
        log_probability(lazy, torch.tensor([0, 1]), "zloss")
    with pytest.raises(ValueError, match="unknown spherical loss 'cce'"):
        log_probability(lazy, torch.tensor([0, 1]), "cce")
    with pytest.raises(IndexError, match="5 is out of bounds"):
        log_probability(lazy, torch.tensor([0, 5]), "log_taylor")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zloss", {"a": 0.0}, "a must be a finite number above 0, got 0.0"),
        ("zloss", {"b": math.inf}, "b must be a finite number, got inf"),
        ("zloss", {"eps": -1.0}, "eps must be"),
        ("zloss", {"sharpness": 1.0}, "unknown option sharpness for loss 'zloss'; known are engine, a, b, eps"),
        ("log_spherical", {"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
        ("log_taylor", {"eps": 1.0}, "unknown option eps for loss 'log_taylor'; known are engine"),
        ("mse", {"a": 1.0}, "unknown option a for loss 'mse'; known are engine"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name, **options)


def test_a_sum_with_cross_entropy():
    hidden, weight, bias, labels = inputs()
    logits = dense_logits(hidden, weight, bias)
    expected = F.cross_entropy(logits, labels, reduction="none") + 0.1 * zloss(logits, labels, 0.5, 2.0)
    rows = get_loss("cce+0.1*zloss", a=0.5, b=2.0)(xhead.LazyLogits(hidden, weight, bias), labels)
    assert relative_error(rows, expected) < 1e-9
    pairs = zip(*(torch.autograd.grad(each.sum(), (hidden, weight, bias)) for each in (rows, expected)), strict=True)
    assert all(relative_error(mine, exact) < 1e-9 for mine, exact in pairs)


@each
def test_a_patched_model_learns_and_generates(name):
    """The words of a repeating sequence, by greedy generation from real logits."""
    torch.manual_seed(0)
    model = xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=False), loss=name)
    ids = torch.arange(4, 10).repeat(6)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    generated = model.generate(ids[:, :7], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    if name == "log_spherical":  # blind to the sign: what it says is the largest |o|
        with torch.no_grad():
            found = model(input_ids=ids).logits.abs().argmax(-1)[0, 6:12]
    else:
        found = generated[0, 7:]
    assert torch.equal(found, ids[0, 7:13])
    assert xhead.status(model).materialized == 0
    assert model(**tokens()).loss.isfinite()
