"""Softmax, top-k and pair losses with any number of right classes a row, against dense float64 definitions."""

import math
import warnings

import pytest
import torch

import xhead
from benchmarks import decoupled
from benchmarks.measure import peak_allocated
from tests.dense import dense_logits, relative_error
from tests.largest import Largest
from xhead import replay
from xhead.engines import soft_topk
from xhead.engines.row_functions import Processes
from xhead.losses import get_loss, vectors
from xhead.statistics import row_statistics

ROWS, CLASSES, SIZE = 19, 1031, 11
NAMES = {
    "infonce": {},
    "decoupled_softmax": {},
    "soft_topk": {"k": (1, 5)},
    "mann_whitney": {},
}
each = pytest.mark.parametrize("name", NAMES)


def loss_of(name, **options):
    return get_loss(name, **{**NAMES[name], **options})


def softplus(value):
    return torch.log1p(torch.exp(-value.abs())) + value.clamp(min=0)


def bisected_threshold(scores, k, alpha):
    """t with sum sigmoid(alpha (scores + t)) = k, by halving, with one Newton step that carries the gradient."""
    low, high = -scores.max().item() - 60 / alpha, -scores.min().item() + 60 / alpha
    fixed = scores.detach()
    largest = fixed.sort(descending=True).values
    for _ in range(80):
        middle = (low + high) / 2
        # What passes below the k largest against what they lack: each side keeps its digits.
        x = alpha * (largest + middle)
        if x[k:].sigmoid().sum() < (-x[:k]).sigmoid().sum():
            low = middle
        else:
            high = middle
    x = alpha * (fixed + middle)
    v = torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)
    return middle - ((v - v.logsumexp(0)).exp() * (scores - fixed)).sum()


def definition(name, logits, sets, temperature=1.0):
    rows = []
    for scores, labels in zip(logits / temperature, sets, strict=True):
        positive = scores[sorted(labels)]
        negative = scores[sorted(set(range(len(scores))) - labels)]
        if not labels:
            rows.append(0.0 * scores.sum())
        elif name == "infonce":
            rows.append((scores.logsumexp(0) - positive).mean())
        elif name == "decoupled_softmax":
            rows.append(softplus(negative.logsumexp(0) - positive).mean() if len(negative) else 0.0 * scores.sum())
        elif name == "mann_whitney":
            pairs = softplus(negative[None] - positive[:, None])
            rows.append(pairs.mean() if pairs.numel() else 0.0 * scores.sum())
        else:
            t = torch.stack([bisected_threshold(scores, k, 2.0) for k in NAMES["soft_topk"]["k"]])
            rows.append(softplus(-2.0 * (positive[None] + t[:, None])).mean())
    return torch.stack(rows)


def inputs(dtype=torch.float64, rows=ROWS, classes=CLASSES, size=SIZE, peak=0.4):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, size), (classes, size), (classes,))
    )
    hidden *= peak * torch.linspace(0.2, 4.0, rows, dtype=torch.float64)[:, None]
    labels = torch.randint(-1, classes, (rows, 4), generator=generator)
    labels[:, 2] = labels[:, 1]  # named twice
    labels[1] = -1  # none
    labels[2:5, 0] = dense_logits(hidden, weight, bias).argmax(-1)[2:5]
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], labels


def sets_of(labels):
    return [set(row) - {-1} for row in labels.tolist()]


def sparse(labels, classes):
    dense = torch.zeros(labels.shape[0], classes)
    for row, columns in enumerate(sets_of(labels)):
        dense[row, sorted(columns)] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta, PyTorch says
        return dense.to_sparse_csr()


@pytest.mark.parametrize("form", [{}, {"scale": 0.7, "softcap": 4.0}], ids=["linear", "capped"])
@each
def test_rows_and_gradients(name, form):
    sides, labels = inputs()
    upstream = torch.randn(ROWS, dtype=torch.float64)
    expected = definition(name, dense_logits(*sides, **form), sets_of(labels), temperature=0.8)
    true = torch.autograd.grad(expected, sides, upstream)
    engines = ("reference", "chunked") if name in ("infonce", "decoupled_softmax") else (None,)
    for engine in engines:
        loss = loss_of(name, temperature=0.8, **({"engine": engine} if engine else {}))
        for form_of_labels in (labels, sparse(labels, CLASSES)):
            rows = loss(xhead.LazyLogits(*sides, **form), form_of_labels)
            assert rows.shape == (ROWS,) and relative_error(rows, expected) < 1e-9
            assert rows[1] == 0
            ours = torch.autograd.grad(rows, sides, upstream)
            assert all(relative_error(mine, exact) < 1e-9 for mine, exact in zip(ours, true, strict=True))


@each
def test_float32(name):
    sides, labels = inputs(torch.float32)
    expected = definition(name, dense_logits(*sides), sets_of(labels))
    rows = loss_of(name, **({"filter_eps": None} if name == "infonce" else {}))(xhead.LazyLogits(*sides), labels)
    assert rows.dtype == torch.float32 and relative_error(rows, expected) < 1e-5
    pairs = zip(torch.autograd.grad(rows.sum(), sides), torch.autograd.grad(expected.sum(), sides), strict=True)
    assert all(relative_error(mine, exact) < 1e-5 for mine, exact in pairs)


@each
def test_derivatives(name):
    sides, _ = inputs(rows=4, classes=7, size=3)
    labels = torch.tensor([[0, 3, 3], [-1, -1, -1], [4, -1, 2], [6, 6, 6]])
    loss = loss_of(name, **({"k": (1, 3)} if name == "soft_topk" else {}))
    torch.autograd.gradcheck(lambda *s: loss(xhead.LazyLogits(*s), labels), sides)


@each
def test_all_classes_right_and_no_rows(name):
    sides, _ = inputs(rows=2, classes=5, size=3)
    labels = torch.stack([torch.arange(5), torch.tensor([1, -1, -1, -1, -1])])
    options = {"k": 2} if name == "soft_topk" else {}
    rows = loss_of(name, **options)(xhead.LazyLogits(*sides), labels)
    (gradient,) = torch.autograd.grad(rows.sum(), sides[0])
    assert rows.isfinite().all() and gradient.isfinite().all()
    if name in ("decoupled_softmax", "mann_whitney"):
        assert rows[0] == 0 and not gradient[0].any()
    assert rows[1] > 0 and gradient[1].any()
    empty = loss_of(name, **options)(xhead.LazyLogits(sides[0][:0], sides[1]), labels[:0])
    assert empty.shape == (0,)
    assert not any(g.any() for g in torch.autograd.grad(empty.sum(), sides[:2]))


@pytest.mark.parametrize("lead", [40.0, 90.0, 3000.0])
@each
def test_positives_that_lead_or_trail_by_far_in_float32(name, lead):
    weight = torch.eye(6)[:, :2].clone().requires_grad_()
    hidden = (lead * torch.tensor([[1.0, 0.0], [1.0, 0.99], [0.0, 1.0]])).requires_grad_()
    labels = torch.tensor([[0, -1], [0, 1], [0, 2]])
    options = {"k": 1} if name == "soft_topk" else {}
    rows = loss_of(name, **options)(xhead.LazyLogits(hidden, weight), labels)
    gradients = torch.autograd.grad(rows.sum(), (hidden, weight))
    assert rows.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert rows[2] > lead / 4
    if name == "decoupled_softmax":
        exact = definition(name, dense_logits(hidden, weight), sets_of(labels))
        assert torch.allclose(rows.double(), exact, rtol=1e-5, atol=1e-37)
    if name == "soft_topk":
        # The largest leads five equal ones: `5 exp(2 t) = exp(-2 (lead + t))`, and labels at 0 pay -2 t.
        t = -lead / 2 - math.log(5) / 4
        assert rows[2].item() == pytest.approx(-2 * t, rel=1e-5)


def test_every_positive_is_kept_and_none_is_pushed_down():
    sides, labels = inputs()
    labels[:, 3] = CLASSES - 1  # the last class too
    logits = dense_logits(*sides).detach()
    scores = logits.clone().requires_grad_()
    rows = loss_of("decoupled_softmax")(
        xhead.LazyLogits(torch.eye(ROWS, dtype=torch.float64), scores.T.contiguous()), labels
    )
    (gradient,) = torch.autograd.grad(rows.sum(), scores)
    for row, columns in enumerate(sets_of(labels)):
        assert all(gradient[row, column] < 0 for column in columns)
        assert abs(gradient[row].sum()) < 1e-12


def alone(scores):
    return Processes.alone(torch.zeros(scores.shape[0] + 1, dtype=torch.int64), scores.shape[1])


def test_threshold_of_many_and_of_equal_classes():
    for scores, k in ((torch.randn(3, 200_000), 1), (torch.zeros(2, 1000), 5), (torch.randn(2, 1000) * 1e-3, 999)):
        t = soft_topk.solve(scores.clone(), k, 2.0, torch.empty_like(scores), alone(scores))
        passed = (2.0 * (scores.double() + t.double()[:, None])).sigmoid().sum(1)
        assert torch.allclose(passed, torch.full_like(passed, k), rtol=2e-5)


def test_the_threshold_leaves_the_scores_as_they_were():
    scores = torch.randn(4, 50)
    before = scores.clone()
    soft_topk.solve(scores, 5, 2.0, torch.empty_like(scores), alone(scores))
    assert torch.equal(scores, before)


@each
def test_memory_is_bounded(name, monkeypatch):
    """One gradient of the weight, and beyond it less than a quarter of the logits."""
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 1 << 18)
    sides, labels = inputs(torch.float32, rows=160, classes=30_011, size=8)
    hidden, weight, _ = sides
    step = loss_of(name, **({"filter_eps": None} if name == "infonce" else {}))

    def run():
        step(xhead.LazyLogits(hidden, weight), labels).sum().backward()

    _, beyond = peak_allocated(run, lambda: (hidden.grad, weight.grad))
    assert beyond < 160 * 30_011


@pytest.mark.parametrize("name", ["infonce", "decoupled_softmax", "sigmoid"])
def test_there_is_one_gradient_of_the_weight(name):
    sides, labels = inputs(torch.float32, rows=8, classes=20_000, size=64)
    with Largest() as seen:
        get_loss(name)(xhead.LazyLogits(*sides), labels).sum().backward()
    assert seen.numel == 20_000 * 64
    sides, labels = inputs(torch.float32, rows=8, classes=20_000, size=64)
    hidden, weight, bias = sides

    def run():
        get_loss(name)(xhead.LazyLogits(*sides), labels).sum().backward()

    run()
    hidden.grad = weight.grad = bias.grad = None
    _, beyond = peak_allocated(run, lambda: (hidden.grad, weight.grad, bias.grad))
    assert beyond < weight.numel() * 4


@each
def test_half_precision_and_autocast(name):
    sides, labels = inputs(torch.bfloat16)
    rows = loss_of(name)(xhead.LazyLogits(*sides), labels)
    assert rows.dtype == torch.float32
    assert relative_error(rows, definition(name, dense_logits(*sides), sets_of(labels))) < 1e-5
    gradients = torch.autograd.grad(rows.sum(), sides)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)
    hidden, weight, bias = (side.detach().float().requires_grad_() for side in sides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_of(name)(xhead.LazyLogits(hidden, weight, bias), labels)
        cast.sum().backward()
    assert relative_error(cast, rows) < 1e-5
    assert hidden.grad.dtype == torch.float32 and relative_error(weight.grad, gradients[1]) < 1e-2


def test_sum_over_positives():
    sides, labels = inputs()
    count = torch.tensor([len(columns) for columns in sets_of(labels)])
    for name in ("infonce", "decoupled_softmax"):
        mean = loss_of(name)(xhead.LazyLogits(*sides), labels)
        assert torch.allclose(mean * count, loss_of(name, positives="sum")(xhead.LazyLogits(*sides), labels))


@pytest.mark.parametrize("engine", ["reference", "chunked", "gram"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_column_logits_are_those_of_the_sets(engine, softcap):
    (hidden, weight, bias), labels = inputs()
    mask = torch.arange(ROWS) % 3 != 0
    found = row_statistics(
        hidden, weight, ("column_logits",), bias=bias, columns=labels, softcap=softcap, row_mask=mask, engine=engine
    ).column_logits
    logits = dense_logits(hidden, weight, bias, softcap=softcap)
    pairs = [(row, column) for row, columns in enumerate(sets_of(labels)) for column in sorted(columns)]
    expected = torch.stack([logits[pair] if mask[pair[0]] else 0.0 * logits[pair] for pair in pairs])
    assert torch.allclose(found, expected, rtol=1e-12)
    upstream = torch.randn(len(pairs), dtype=torch.float64)
    sides = (hidden, weight, bias)
    ours, true = (torch.autograd.grad(value, sides, upstream) for value in (found, expected))
    assert all(relative_error(mine, exact) < 1e-12 for mine, exact in zip(ours, true, strict=True))


@pytest.mark.parametrize("name", ["infonce", "decoupled_softmax", "sigmoid"])
def test_logits_that_are_replayed_in_blocks_of_rows(name, monkeypatch):
    sides, labels = inputs()
    monkeypatch.setattr(replay, "BLOCK_BYTES", 4 * CLASSES * 5)

    def steps(logits):
        return torch.tanh(2.0 * torch.tanh(logits)) * 3.0

    dense = steps(dense_logits(*sides))
    if name == "sigmoid":
        right = sparse(labels, CLASSES).to_dense().double()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(dense, right, reduction="none").sum(1)
    else:
        expected = definition(name, dense, sets_of(labels))
    for form in (labels, sparse(labels, CLASSES)):
        with pytest.warns(xhead.MaterializedWarning, match="replayed row block by row block"):
            rows = get_loss(name)(steps(xhead.LazyLogits(*sides)), form)
        assert relative_error(rows, expected) < 1e-9
        true = torch.autograd.grad(expected.sum(), sides, retain_graph=True)
        pairs = zip(torch.autograd.grad(rows.sum(), sides), true, strict=True)
        assert all(relative_error(mine, exact) < 1e-9 for mine, exact in pairs)


@pytest.mark.parametrize("name", ["soft_topk", "mann_whitney"])
def test_logits_of_another_form_are_refused(name):
    sides, labels = inputs()
    with pytest.raises(RuntimeError, match="these logits are not cap"):
        get_loss(name)(torch.tanh(torch.tanh(xhead.LazyLogits(*sides))), labels)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("infonce", {"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ("decoupled_softmax", {"positives": "all"}, "positives must be one of 'mean', 'sum', got 'all'"),
        ("decoupled_softmax", {"filter_eps": None}, "unknown option filter_eps"),
        ("soft_topk", {"k": 0}, "k must be a whole number of at least 1, or a tuple of such, got 0"),
        ("soft_topk", {"k": ()}, "k must be a whole number of at least 1"),
        ("soft_topk", {"alpha": -1.0}, "alpha must be"),
        ("mann_whitney", {"temperature": math.inf}, "temperature must be"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name, **options)


def test_k_of_all_classes_is_refused():
    sides, _ = inputs(rows=2, classes=5)
    with pytest.raises(ValueError, match="k must be below the number of classes 5, got 5"):
        get_loss("soft_topk", k=(1, 5))(xhead.LazyLogits(*sides), torch.zeros(2, 1, dtype=torch.int64))


def test_benchmark_command(tmp_path, capsys):
    arguments = ["--labels", "3000", "--batch", "64", "--width", "16", "--repeats", "1"]
    record = decoupled.main([*arguments, "--output", str(tmp_path / "decoupled.json")])
    dense, ours = record["decoupled"]
    assert ours["hidden_error"] < 1e-5 and ours["weight_error"] < 1e-5 and dense["hidden_error"] == 0
    assert "| 3,000 |" in capsys.readouterr().out.replace("3,000  |", "3,000 |")
    record = decoupled.main([*arguments, "--dense-gigabytes", "0", "--output", str(tmp_path / "decoupled.json")])
    assert [each["name"] for each in record["decoupled"]] == [decoupled.OURS]
    assert (tmp_path / "decoupled.json").is_file()
