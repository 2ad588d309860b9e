"""Sums of losses by name, through the lazy logits that their terms share and through a patched model."""

import copy

import pytest
import torch
import torch.nn.functional as F

import xhead
import xhead.lazy
from benchmarks.measure import peak_allocated
from tests.dense import dense_logits, relative_error
from tests.tiny import assert_same_gradients, tiny, tokens, twins
from xhead.losses import get_loss
from xhead.losses.composition import parse_sum
from xhead.losses.number_tokens import number_token_loss
from xhead.standin import Record

# Of the labels 4 to 59 that the tiny models see.
NUMBERS = {"token_ids": list(range(10, 50)), "values": [each % 10 for each in range(10, 50)]}


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("cce", [(1, "cce")]),
        ("cce+0.3*ntl_was", [(1, "cce"), (0.3, "ntl_was")]),
        (" 2 * cce + ntl_was+1e+2*ntl_mse ", [(2, "cce"), (1, "ntl_was"), (100, "ntl_mse")]),
        ("cce+-.5*cce", [(1, "cce"), (-0.5, "cce")]),
    ],
)
def test_how_a_sum_is_written(text, terms):
    assert parse_sum(text) == terms


@pytest.mark.parametrize("text", ["", "cce+", "+cce", "x*cce", "*cce", "0.3*", "nan*cce", "inf*cce", "2*3*cce"])
def test_what_is_no_sum(text):
    with pytest.raises(ValueError, match=r"is no term of a sum; write the name of a loss, or number\*name"):
        get_loss(text)


def test_options_go_to_the_terms_that_have_them():
    loss = get_loss("cce+0.3*ntl_was+0.1*ntl_mse", label_smoothing=0.1, reweigh=True, p=3, filter_eps=None, **NUMBERS)
    cce, was, mse = (term.config for _, term in loss.terms)
    assert (cce.label_smoothing, was.reweigh, mse.reweigh, mse.p) == (0.1, True, True, 3)
    assert cce.filter_eps is was.filter_eps is mse.filter_eps is None
    assert loss.name == "cce+0.3*ntl_was+0.1*ntl_mse"
    with pytest.raises(ValueError, match=r"unknown option p for loss 'cce\+ntl_was'; known .*label_smoothing.*reweigh"):
        get_loss("cce+ntl_was", p=2, **NUMBERS)
    with pytest.raises(ValueError, match=r"unknown loss 'ntl' in 'cce\+ntl'; known are .*cce, .*ntl_was"):
        get_loss("cce+ntl")
    with pytest.raises(ValueError, match="either tokenizer="):
        get_loss("cce+ntl_was")
    with pytest.raises(TypeError, match="loss must be a name or a callable, got 3"):
        get_loss(3)


def inputs():
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((31, 7), (64, 7), (64,)))
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), torch.randint(4, 60, (31,))


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("text", ["cce+0.3*ntl_was", "0.3*ntl_was+cce", "ntl_mse+ntl_number+2*ntl_was+0.5*cce"])
def test_a_sum_is_the_sum_of_its_terms_in_one_pass(text, engine, monkeypatch):
    hidden, weight, bias, labels = inputs()
    asked = []
    original = xhead.lazy.row_statistics

    def counted(hidden, weight, names, **options):
        asked.extend(names)
        return original(hidden, weight, names, **options)

    monkeypatch.setattr(xhead.lazy, "row_statistics", counted)
    options = {"reweigh": True, "engine": engine, **NUMBERS}
    rows = get_loss(text, **options)(xhead.LazyLogits(hidden, weight, bias), labels)
    assert asked.count("lse") == 1
    dense = dense_logits(hidden, weight, bias)
    expected = torch.zeros(31, dtype=torch.float64)
    for factor, name in parse_sum(text):
        if name == "cce":
            expected = expected + factor * F.cross_entropy(dense, labels, reduction="none")
        else:
            term = number_token_loss(dense, labels, name, reduction="none", reweigh=True, **NUMBERS)
            expected = expected + factor * term
    assert relative_error(rows, expected) < 1e-12
    sides, upstream = (hidden, weight, bias), torch.randn_like(rows)
    ours, true = (torch.autograd.grad(each, sides, upstream) for each in (rows, expected))
    assert all(relative_error(*pair) < 1e-12 for pair in zip(ours, true, strict=True))


@pytest.mark.parametrize("text", ["cce+0.3*ntl_was", "ntl_mse+ntl_was+cce", "0.3*ntl_was"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_terms_share_one_gradient_of_the_weight(text, dtype):
    """Beside the gradients, nothing of the weight's size is held: not for the rows of the number tokens either."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 96, generator=generator).to(dtype).requires_grad_() for n in (20, 20_011))
    labels = torch.randint(4, 60, (20,), generator=generator)
    loss = get_loss(text, filter_eps=None, **NUMBERS)

    def step():
        loss(xhead.LazyLogits(hidden, weight), labels).sum().backward()

    _, beyond = peak_allocated(step, lambda: (hidden.grad, weight.grad))
    assert weight.grad.layout == torch.strided and weight.grad.any()
    assert beyond < weight.nbytes / 3


def test_derivatives_of_derivatives():
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 6))
    numbers = {"token_ids": [1, 4, 5], "values": [3, 0, 7]}
    loss, labels = get_loss("cce+0.3*ntl_was", **numbers), torch.tensor([1, 0, 5, 4])

    def function(hidden, weight):
        return loss(xhead.LazyLogits(hidden, weight), labels)

    torch.autograd.gradcheck(function, (hidden, weight))
    torch.autograd.gradgradcheck(function, (hidden, weight))


def test_arguments_of_the_call_go_to_the_terms_that_take_them():
    hidden, weight, bias, labels = inputs()
    class_weight = torch.rand(64, dtype=torch.float64)
    logits, dense = xhead.LazyLogits(hidden, weight, bias), dense_logits(hidden, weight, bias)
    logits._record.loss = get_loss("cce+0.3*ntl_was", **NUMBERS)
    found = F.cross_entropy(logits, labels, weight=class_weight, label_smoothing=0.1, reduction="sum")
    numbers = number_token_loss(dense, labels, reduction="sum", **NUMBERS)
    expected = F.cross_entropy(dense, labels, weight=class_weight, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(found, expected + 0.3 * numbers)
    logits._record.loss = get_loss("2*ntl_was", **NUMBERS)
    with pytest.raises(ValueError, match=r"called with class_weight, which the loss '2\*ntl_was' does not take"):
        F.cross_entropy(logits, labels, weight=class_weight)


TEXT = "cce+0.3*ntl_was+0.2*ntl_number"


def expected_loss(logits, labels, items=None, **options):
    """What a model with TEXT trains on: rows summed, divided by the number of labels. logits (B, T, V)."""
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    for factor, name in ((0.3, "ntl_was"), (0.2, "ntl_number")):
        total = total + factor * number_token_loss(logits, labels, name, reduction="sum", **NUMBERS, **options)
    return total / ((labels != -100).sum() if items is None else items)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("items", [None, 7])
def test_patched_causal_models(name, items):
    plain, model = twins(name)
    xhead.patch(model, loss=TEXT, reweigh=True, filter_eps=None, **NUMBERS)
    batch = tokens(length=20)
    batch["labels"][:, 9] = -100  # ends a number in the middle
    extra = {} if items is None else {"num_items_in_batch": items}
    loss = model(**batch, **extra).loss
    expected = expected_loss(plain(**batch).logits[:, :-1], batch["labels"][:, 1:], items, reweigh=True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, plain)
    status = xhead.status(model)
    assert (status.cut, status.materialized, status.loss) == (1, 0, TEXT)


def test_patched_sequence_to_sequence_model():
    plain, model = twins("T5ForConditionalGeneration")
    xhead.patch(model, loss="cce+0.3*ntl_was", **NUMBERS)
    batch = tokens()
    loss, logits = model(**batch).loss, plain(**batch).logits
    total = number_token_loss(logits, batch["labels"], reduction="sum", **NUMBERS)
    expected = (
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) + 0.3 * total / (batch["labels"] != -100).sum()
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, plain)


def test_patching_twice_and_wrongly():
    model = xhead.patch(tiny("LlamaForCausalLM"), loss="cce+0.3*ntl_was", **NUMBERS)
    assert xhead.patch(model, loss="cce+0.3*ntl_was", **copy.deepcopy(NUMBERS)) is model
    with pytest.raises(ValueError, match="already patched, with loss='cce.0.3.ntl_was'"):
        xhead.patch(model, loss="cce+0.4*ntl_was", **NUMBERS)


def test_compiled_models():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model, loss=TEXT, reweigh=True, **NUMBERS)
    batch = tokens(length=20)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss
    expected = expected_loss(plain(**batch).logits[:, :-1], batch["labels"][:, 1:], reweigh=True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, plain)


class Gathered:
    """A projection whose weight exists only while it is consumed, as one that is sharded over processes."""

    def __init__(self, weight, bias):
        self.shards, self.out_features, self.uses = (weight, bias), len(weight), 0

    def consume(self, hidden, function):
        self.uses += 1
        return function(hidden, *self.shards)

    def trains(self):
        return True


def test_a_weight_that_can_only_be_read_in_its_call():
    hidden, weight, bias, labels = inputs()
    head = Gathered(weight, bias)
    logits = xhead.LazyLogits.deferred(hidden, head, Record(loss=get_loss("cce+0.3*ntl_was", reweigh=True, **NUMBERS)))
    logits = torch.tanh(logits / 3) * 3
    dense = 3 * torch.tanh(dense_logits(hidden, weight, bias) / 3)
    expected = F.cross_entropy(dense, labels, reduction="sum")
    expected = expected + 0.3 * number_token_loss(dense, labels, reduction="sum", reweigh=True, **NUMBERS)
    torch.testing.assert_close(F.cross_entropy(logits, labels, reduction="sum"), expected)
    assert head.uses == 1
