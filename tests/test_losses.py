"""Every loss of the registry against its formula on dense float64 logits, through every way of calling it."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

import xhead
from benchmarks.measure import peak_allocated
from tests.dense import dense_logits, relative_error
from tests.dense_losses import DEFINITIONS, cross_entropy
from tests.tiny import tokens, twins
from xhead.losses import describe_loss, get_loss, vectors

ROWS, CLASSES, SIZE = 41, 1031, 13


LINEAR_ONLY = ("logit_clip", "aldr_kl")
NUMBERS = {"token_ids": list(range(2, 12)), "values": [float(value) for value in range(10)]}
NEEDED = {
    "logit_clip": {"max_norm": 40.0},
    "subcenter_arcface": {"sub_centers": 1},
    **dict.fromkeys(("ntl_was", "ntl_mse", "ntl_mae", "ntl_number"), NUMBERS),
}
CHECKED = {"elasticface": {"deviation": 0.0}}
defined = pytest.mark.parametrize(
    ("name", "options", "definition"),
    DEFINITIONS,
    ids=[name + "".join(f"-{value}" for value in options.values()) for name, options, _ in DEFINITIONS],
)
HERE = sorted({name for name, _, _ in DEFINITIONS})
each = pytest.mark.parametrize("name", HERE)
registered = pytest.mark.parametrize("name", xhead.list_losses())


def first_definition(name):
    return next((options, definition) for other, options, definition in DEFINITIONS if other == name)


def inputs(dtype=torch.float64, rows=ROWS, classes=CLASSES, size=SIZE, peak=0.3, seed=0):
    """Logits whose norms lie on both sides of the clipping, and targets that are likely in half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, size), (classes, size), (classes,))
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    hidden *= peak * torch.linspace(0.5, 2.0, rows, dtype=torch.float64)[:, None]
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::2] = dense_logits(hidden, weight, bias).argmax(-1)[::2]
    return *(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), labels


@defined
@pytest.mark.parametrize("form", [{}, {"scale": 0.7, "softcap": 4.0}], ids=["linear", "capped"])
def test_rows_and_gradients(name, options, definition, form):
    hidden, weight, bias, labels = inputs()
    if form and name in LINEAR_ONLY:
        with pytest.raises(ValueError, match=r"linear in the hidden states, got softcap=4\.0.*use another loss"):
            get_loss(name, **options)(xhead.LazyLogits(hidden, weight, bias, **form), labels)
        form = {"scale": form["scale"]}
    expected = definition(dense_logits(hidden, weight, bias, **form), labels)
    sides, upstream = (hidden, weight, bias), torch.randn(ROWS, dtype=torch.float64)
    true = torch.autograd.grad(expected, sides, upstream)
    for engine in ("reference", "chunked"):
        logits = xhead.LazyLogits(hidden, weight, bias, **form)
        rows = get_loss(name, engine=engine, **options)(logits, labels)
        assert rows.shape == (ROWS,) and relative_error(rows, expected) < 1e-9
        ours = torch.autograd.grad(rows, sides, upstream)
        assert all(relative_error(mine, exact) < 1e-9 for mine, exact in zip(ours, true, strict=True))


@defined
def test_float32(name, options, definition):
    hidden, weight, bias, labels = inputs(torch.float32)
    sides = (hidden, weight, bias)
    expected = definition(dense_logits(*sides), labels)
    exact_options = {"filter_eps": None} if "filter_eps" in describe_loss(name).config.__dataclass_fields__ else {}
    rows = get_loss(name, engine="chunked", **exact_options, **options)(xhead.LazyLogits(*sides), labels)
    assert rows.dtype == torch.float32 and relative_error(rows, expected) < 1e-5
    pairs = zip(torch.autograd.grad(rows.sum(), sides), torch.autograd.grad(expected.sum(), sides), strict=True)
    assert all(relative_error(mine, exact) < 1e-5 for mine, exact in pairs)


@defined
def test_derivatives(name, options, definition):
    hidden, weight, bias, labels = inputs(rows=3, classes=5, size=4, peak=1.0)
    options = options | ({"max_norm": 2.0} if name == "logit_clip" else {})

    def function(*sides):
        return get_loss(name, engine="chunked", **options)(xhead.LazyLogits(*sides), labels)

    torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("name", sorted(set(xhead.list_losses()) - set(HERE)))
def test_derivatives_of_the_others(name):
    """Every loss of the registry has one of the two."""
    hidden, weight, _, _ = inputs(rows=3, classes=12, size=3, peak=1.0)
    labels, options = torch.tensor([5, 2, 11]), CHECKED.get(name, NEEDED.get(name, {}))

    def function(hidden, weight):
        return get_loss(name, **options)(xhead.LazyLogits(hidden, weight), labels)

    # The norm of a hidden state that moves AdaFace's margin is a constant to its gradient, by definition.
    torch.autograd.gradcheck(function, (hidden.detach() if name == "adaface" else hidden, weight))


@each
def test_without_bias_and_without_rows(name):
    hidden, weight, _, labels = inputs()
    options, definition = first_definition(name)
    loss = get_loss(name, **options)
    rows = get_loss(name, **options)(xhead.LazyLogits(hidden, weight), labels)
    assert relative_error(rows, definition(dense_logits(hidden, weight), labels)) < 1e-9
    empty = loss(xhead.LazyLogits(hidden[:0], weight), labels[:0])
    assert empty.shape == (0,)
    gradients = torch.autograd.grad(empty.sum(), (hidden, weight))
    assert not any(gradient.any() for gradient in gradients)


@each
def test_confident_and_hopeless_rows_stay_finite(name):
    """p_y of exactly 1, and of 0 in float32: values and gradients are numbers, and those of p_y = 1 are small."""
    weight = torch.eye(6).requires_grad_()
    hidden = (60.0 * torch.eye(6)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 4, 5, 3])
    options = NEEDED.get(name, {})
    rows = get_loss(name, **options)(xhead.LazyLogits(hidden, weight), labels)
    gradients = torch.autograd.grad(rows.sum(), (hidden, weight))
    assert rows.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    if name in ("cce", "focal", "poly1", "gce", "mae", "comp_sum", "nce", "rce", "apl"):
        assert (rows[:3] == 0).all() and gradients[0][:3].abs().max() < 1e-20
        assert (rows[3:] > 0).all()


def test_small_losses_keep_their_digits():
    """With 1 - p of 1e-12, 1 - p as a difference from 1 would have none left."""
    hidden = torch.tensor([[27.6]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [-1.0]], dtype=torch.float64)
    missing = math.exp(-27.6) / (1 + math.exp(-27.6))
    exact = {"mae": 2 * missing, "gce": missing, "rce": -math.log(1e-4) * missing, "focal": missing**3}
    for name, value in exact.items():
        rows = get_loss(name)(xhead.LazyLogits(hidden, weight), torch.tensor([0]))
        assert abs(rows.item() / value - 1) < 1e-2, name
    # A margin that is met leaves less than the log-sum-exps could tell apart.
    rows = get_loss("ldr_kl", margin=5.0)(xhead.LazyLogits(hidden.float(), weight.float()), torch.tensor([0]))
    assert abs((rows.item() + math.log(2)) - math.exp(5 - 27.6)) < 1e-7
    gradient = torch.autograd.grad(rows.sum(), hidden)[0]
    assert abs(gradient.item() / -math.exp(5 - 27.6) - 1) < 1e-4


def test_largest_logit_of_maxsup_has_a_gradient():
    hidden, weight, bias, labels = inputs()
    strong, plain = get_loss("maxsup", alpha=1.0), get_loss("maxsup", alpha=0.0)
    difference = strong(xhead.LazyLogits(hidden, weight, bias), labels) - plain(
        xhead.LazyLogits(hidden, weight, bias), labels
    )
    (gradient,) = torch.autograd.grad(difference.sum(), hidden)
    largest = dense_logits(hidden, weight, bias).argmax(-1)
    assert torch.allclose(gradient, weight[largest] - weight.mean(0))


def test_the_filter_serves_the_softmax_losses():
    """Its options reach the primitive: a coarse filter changes the gradient, None does not."""
    hidden, weight, bias, labels = inputs(torch.float32, peak=1.5)
    for name in HERE:
        config = describe_loss(name).config
        if "filter_eps" not in config.__dataclass_fields__:
            continue
        gradients = {}
        for eps in (None, 2**-5):
            options = {"filter_eps": eps, "compensate": False, "engine": "chunked", **NEEDED.get(name, {})}
            rows = get_loss(name, **options)(xhead.LazyLogits(hidden, weight, bias), labels)
            gradients[eps] = torch.autograd.grad(rows.sum(), weight)[0]
        assert not torch.equal(gradients[None], gradients[2**-5]), name


@each
def test_patched_model(name):
    plain, patched = twins("LlamaForCausalLM")
    batch = tokens()
    options, definition = first_definition(name)
    xhead.patch(patched, loss=name, **options)
    loss = patched(**batch).loss
    loss.backward()
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
    logits = plain(input_ids=batch["input_ids"]).logits.flatten(0, 1)
    kept = labels != -100
    expected = definition(logits[kept].double(), labels[kept]).mean()
    expected.backward()
    assert abs(loss.double() - expected) <= 1e-5 * expected.abs()
    for mine, exact in zip(patched.parameters(), plain.parameters(), strict=True):
        assert relative_error(mine.grad, exact.grad, 1e-4) < 1e-3
    status = xhead.status(patched)
    assert (status.cut, status.materialized) == (1, 0)


@each
def test_all_rows_ignored(name):
    hidden, weight, bias, _ = inputs()
    xhead.patch(model := twins("LlamaForCausalLM")[1], loss=name, **NEEDED.get(name, {}))
    batch = tokens()
    logits = model(input_ids=batch["input_ids"]).logits
    total = F.cross_entropy(logits.flatten(0, 1), torch.full((24,), -100), reduction="sum")
    assert total == 0
    total.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    masked = xhead.LazyLogits(hidden, weight, bias)
    masked._row_mask = torch.zeros(ROWS, dtype=torch.bool)
    rows = get_loss(name, **NEEDED.get(name, {}))(masked, torch.zeros(ROWS, dtype=torch.int64))
    kept = torch.where(masked._row_mask, rows, torch.zeros_like(rows))
    assert not any(gradient.any() for gradient in torch.autograd.grad(kept.sum(), (hidden, weight, bias)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each
def test_half_precision_is_that_of_the_statistics(name, dtype):
    *sides, labels = inputs(dtype)
    options, definition = first_definition(name)
    rows = get_loss(name, **options)(xhead.LazyLogits(*sides), labels)
    assert rows.dtype == torch.float32
    # A factor a row that goes into the hidden states is rounded with them.
    rounding = torch.finfo(dtype).eps if name in LINEAR_ONLY else 1e-5
    assert relative_error(rows, definition(dense_logits(*sides), labels)) < rounding
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(rows.sum(), sides))


BREAKING = ("mann_whitney", "soft_topk")  # whose passes go by the sizes of the rows' sets


def check_compiled(name):
    step = get_loss(name, **CHECKED.get(name, NEEDED.get(name, {})))
    hidden, weight, bias, labels = inputs(torch.float32)
    # Those that normalise refuse a bias.
    sides = (hidden, weight, bias) if name in HERE else (hidden, weight)

    def rows(labels, *sides):
        return step(xhead.LazyLogits(*sides), labels)

    torch._dynamo.reset()
    compiled = torch.compile(rows, backend="aot_eager", fullgraph=name not in BREAKING)
    ours = torch.autograd.grad(compiled(labels, *sides).sum(), sides)
    eager = torch.autograd.grad(rows(labels, *sides).sum(), sides)
    assert all(relative_error(mine, true) < 1e-5 for mine, true in zip(ours, eager, strict=True))


@pytest.mark.parametrize("name", ["logit_clip", "asymmetric"])
def test_compiles_to_one_graph(name):
    check_compiled(name)


@pytest.mark.slow
@registered
# torch.compile's own, where it goes on after a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_each_compiles(name):
    check_compiled(name)


def memory_share(loss, classes):
    """Peak memory of forward and backward, the gradients apart, by that of the logits in float32."""
    rows = 160
    hidden, weight, _, labels = inputs(torch.float32, rows=rows, classes=classes, size=8)

    def step():
        loss(xhead.LazyLogits(hidden, weight), labels).sum().backward()

    _, beyond = peak_allocated(step, lambda: (hidden.grad, weight.grad))
    return beyond / (rows * classes * 4)


@pytest.fixture
def small_blocks(monkeypatch):
    """Losses that build a block of rows at a time build small ones here, since the rows are few."""
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 1 << 18)


@registered
@pytest.mark.usefixtures("small_blocks")
def test_no_loss_builds_the_logits(name):
    assert memory_share(get_loss(name, **NEEDED.get(name, {})), 30_011) < 1 / 4


def test_a_loss_that_builds_the_logits_is_found_out():
    def dense(logits, labels):
        return cross_entropy(logits.hidden @ logits.weight.T, labels)

    assert memory_share(dense, 30_011) > 1


@pytest.mark.slow
@registered
@pytest.mark.usefixtures("small_blocks")
def test_no_loss_builds_many_logits(name):
    assert memory_share(get_loss(name, **NEEDED.get(name, {})), 100_003) < 1 / 4


BAD = [
    ("focal", {"gamma": -1.0}, "gamma must be a finite number of at least 0, got -1.0"),
    ("focal", {"gamma": "2"}, "gamma must be a finite number of at least 0, got '2'"),
    ("poly1", {"epsilon": math.nan}, "epsilon must be a finite number, got nan"),
    ("gce", {"q": 0.0}, "q must be a finite number above 0 and at most 1, got 0.0"),
    ("gce", {"q": 1.5}, "q must be a finite number above 0 and at most 1, got 1.5"),
    ("comp_sum", {"tau": -0.1}, "tau must be"),
    ("maxsup", {"alpha": math.inf}, "alpha must be"),
    ("lse_penalty", {"coefficient": -1}, "coefficient must be"),
    ("rce", {"label_floor": 0.0}, "label_floor must be a number between 0 and 1, both left out, got 0.0"),
    ("apl", {"active": "mae"}, "active must be one of ce, nce, focal, nfl, got 'mae'"),
    ("apl", {"passive": "ce"}, "passive must be one of mae, nmae, rce, nrce, got 'ce'"),
    ("apl", {"beta": -1.0}, "beta must be"),
    ("logit_clip", {}, "logit_clip needs max_norm"),
    ("logit_clip", {"max_norm": 0.0}, "max_norm must be a finite number above 0, got 0.0"),
    ("ldr_kl", {"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
    ("aldr_kl", {"alpha": 1.0}, "alpha must be a finite number above 1, got 1.0"),
    ("aldr_kl", {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    ("aldr_kl", {"tolerance": -1.0}, "tolerance must be a finite number of at least 0, got -1.0"),
    ("asymmetric", {"margin": 1.0}, "margin must be below 1, got 1.0"),
    ("asymmetric", {"gamma_negative": -1.0}, "gamma_negative must be"),
    ("mae", {"filter_eps": 2.0}, 'filter_eps must be "auto", None or a number'),
    ("sigmoid", {"filter_eps": None}, "unknown option filter_eps for loss 'sigmoid'; known are engine"),
    ("stablemax", {"gamma": 1.0}, "unknown option gamma for loss 'stablemax'; known are engine"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_loss(name, **options)


@pytest.mark.parametrize("name", sorted(set(HERE) - {"cce"}))
def test_options_of_the_call_that_a_loss_does_not_take(name):
    hidden, weight, bias, labels = inputs()
    loss = get_loss(name, **NEEDED.get(name, {}))
    for option in ({"class_weight": torch.ones(CLASSES)}, {"label_smoothing": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}, which the loss '{name}' does not take"):
            loss(xhead.LazyLogits(hidden, weight, bias), labels, **option)


@registered
def test_the_registry_tells_of_every_loss(name):
    entry = describe_loss(name)
    assert entry.formula and entry.source and set(entry.statistics) <= set(xhead.Statistics.__dataclass_fields__)
    assert "z-loss" not in entry.formula.lower()
