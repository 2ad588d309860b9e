"""Number token losses against their formulas, row by row in float64, and which tokens are numbers."""

import pytest
import torch

import xhead
from tests.dense import dense_logits, relative_error
from xhead.losses import get_loss
from xhead.losses.number_tokens import number_token_loss
from xhead.losses.number_vocabulary import number_tokens

ROWS, CLASSES, SIZE = 37, 67, 11
DIGITS = {"token_ids": [5, 3, 40, 41, 42, 43, 44, 45, 46, 66], "values": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}
UNEVEN = {"token_ids": [60, 2, 9, 31], "values": [12.0, -3.0, 345.0, 0.5]}
LOSSES = {
    "was": ("ntl_was", {}),
    "was squashed": ("ntl_was", {"squash_factor": 2.5}),
    "mse": ("ntl_mse", {}),
    "mae": ("ntl_mae", {}),
    "L3": ("ntl_mse", {"p": 3}),
}
# A norm of the difference by the norm of the exact one.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class Tokenizer:
    """As much of a tokenizer as is asked for."""

    def __init__(self, tokens):
        self.vocab = {token: index for index, token in enumerate(tokens)}

    def get_vocab(self):
        return self.vocab


def inputs(dtype=torch.float64, numbers=DIGITS, peak=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, SIZE), (CLASSES, SIZE), (CLASSES,))
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    chosen = torch.tensor(numbers["token_ids"])[torch.randint(len(numbers["values"]), (ROWS,), generator=generator)]
    labels = torch.where(torch.rand(ROWS, generator=generator) < 0.6, chosen, labels)
    return (hidden * peak).requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def definition(logits, labels, name, numbers, squash_factor=None, p=None, reweigh=False):
    """One row after another, straight from the formulas."""
    value_of = dict(zip(numbers["token_ids"], numbers["values"], strict=True))
    ids, values = list(value_of), torch.tensor(list(value_of.values()), dtype=torch.float64)
    p = {"ntl_mse": 2, "ntl_mae": 1}.get(name) if p is None else p

    def distances(y):
        found = (values - y).abs()
        if squash_factor is None:
            return found
        every = [abs(a - b) for a in values for b in values if a != b]
        low, high = min(every), max(every)
        return torch.where(found > 0, 1 + (found - low) * (squash_factor - 1) / (high - low), 0.0)

    worst = max(distances(y).max() for y in values) if p is None else (values.max() - values.min()) ** p
    rows = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        if label not in value_of:
            rows.append(row.sum() * 0)
            continue
        q = torch.softmax(row[ids], 0)
        y = value_of[label]
        loss = (q * distances(y)).sum() if p is None else (y - (q * values).sum()).abs() ** p
        if reweigh:
            mass = torch.softmax(row, 0)[ids].sum()
            loss = loss * mass + 1.01 * worst * (1 - mass)
        rows.append(loss)
    return torch.stack(rows)


def assert_same(found, exact, sides, tolerance):
    assert found.shape == exact.shape
    assert relative_error(found, exact) < tolerance
    upstream = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad(found, sides, upstream.to(found.dtype))
    true = torch.autograd.grad(exact, sides, upstream, retain_graph=True)
    for mine, right in zip(ours, true, strict=True):
        assert relative_error(mine, right) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reweigh", [False, True])
@pytest.mark.parametrize("numbers", [DIGITS, UNEVEN], ids=["digits", "uneven"])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name, numbers, reweigh, dtype):
    loss, options = LOSSES[name]
    for softcap, peak in ((None, 1.0), (7.0, 1.0), (None, 4.0)):
        hidden, weight, bias, labels = inputs(dtype, numbers, peak)
        exact = definition(
            dense_logits(hidden, weight, bias, 0.7, softcap), labels, loss, numbers, reweigh=reweigh, **options
        )
        logits = xhead.LazyLogits(hidden, weight, bias, softcap=softcap, scale=0.7)
        for engine in ("reference", "chunked") if dtype == torch.float64 else ("chunked",):
            found = get_loss(loss, reweigh=reweigh, engine=engine, **numbers, **options)(logits, labels)
            assert_same(found, exact, (hidden, weight, bias), TOLERANCE[dtype])
            assert not found[~torch.isin(labels, torch.tensor(numbers["token_ids"]))].any()


@pytest.mark.parametrize("reweigh", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "number"])
def test_gradcheck(name, reweigh):
    loss, options = LOSSES.get(name, ("ntl_number", {}))
    numbers = {"token_ids": [1, 4, 5, 2], "values": [3, 0, 7, 1]}
    rows = get_loss(loss, reweigh=reweigh, engine="chunked", **numbers, **options)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 6))
    labels = torch.tensor([1, 5, 0, 2, 3])
    assert torch.autograd.gradcheck(lambda h, w: rows(xhead.LazyLogits(h, w), labels), (hidden, weight))


def test_the_gradient_of_a_row_is_the_closed_form():
    logits = torch.randn(1, 10, dtype=torch.float64, requires_grad=True)
    digits = {"token_ids": list(range(10)), "values": list(range(10))}
    q, v, y = logits.softmax(-1)[0].detach(), torch.arange(10.0, dtype=torch.float64), 4
    label = torch.tensor([y])
    was = number_token_loss(logits, label, **digits)
    mse = number_token_loss(logits, label, "ntl_mse", **digits)
    assert torch.allclose(torch.autograd.grad(was, logits)[0][0], q * ((y - v).abs() - was.detach()))
    mean = (q * v).sum()
    assert torch.allclose(torch.autograd.grad(mse, logits)[0][0], 2 * (mean - y) * q * (v - mean))


@pytest.mark.parametrize("reweigh", [False, True])
@pytest.mark.parametrize("loss", ["ntl_was", "ntl_mse", "ntl_mae", "ntl_number"])
def test_no_number_among_the_labels(loss, reweigh):
    hidden, weight, bias, labels = inputs()
    words = torch.tensor([token for token in range(CLASSES) if token not in DIGITS["token_ids"]])
    for each in (words[labels % len(words)], torch.full_like(labels, -100), labels[:0]):
        logits = xhead.LazyLogits(hidden[: len(each)], weight, bias)
        for reduction in ("none", "sum", "mean"):
            found = number_token_loss(logits, each, loss, reduction=reduction, reweigh=reweigh, **DIGITS)
            assert found.shape == (each.shape if reduction == "none" else ())
            assert not found.any()
            for gradient in torch.autograd.grad(found.sum(), (hidden, weight, bias)):
                assert not gradient.any()


def test_half_precision_is_as_exact_as_its_inputs():
    hidden, weight, bias, labels = inputs(torch.bfloat16)
    exact = definition(dense_logits(hidden, weight, bias), labels, "ntl_was", DIGITS, reweigh=True)
    found = get_loss("ntl_was", reweigh=True, filter_eps=None, **DIGITS)(xhead.LazyLogits(hidden, weight, bias), labels)
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < 1e-5


def test_mean_over_the_positions_with_a_number():
    hidden, weight, bias, labels = inputs()
    labels[:9] = -100
    dense = dense_logits(hidden, weight, bias)
    rows = definition(dense, labels, "ntl_was", DIGITS)
    count = torch.isin(labels, torch.tensor(DIGITS["token_ids"])).sum()
    for logits in (dense, xhead.LazyLogits(hidden, weight, bias)):
        for shape in ((ROWS,), (1, ROWS)):
            shaped, labels = logits.reshape(*shape, CLASSES), labels.reshape(shape)
            none = number_token_loss(shaped, labels, reduction="none", **DIGITS)
            assert none.shape == shape
            assert torch.allclose(none.flatten(), rows)
            assert torch.allclose(number_token_loss(shaped, labels, reduction="sum", **DIGITS), rows.sum())
            assert torch.allclose(number_token_loss(shaped, labels, **DIGITS), rows.sum() / count)
    ignored = number_token_loss(dense, labels.flatten(), ignore_index=40, reduction="none", **DIGITS)
    assert not ignored[labels.flatten() == 40].any()


def test_number_tokens_of_a_byte_level_vocabulary():
    tokens = [
        "!",
        *"9876543210",
        "12",
        "Ġ12",
        "Ġ3",
        "-3",
        "1.5",
        ".5",
        "3.",
        "1,000",
        "²",
        "٣",
        "1e5",
        "nan",
        "inf",
        "a1",
    ]
    tokenizer = Tokenizer([*tokens, "007", "-", "Ġ"])
    found = number_tokens(tokenizer)
    assert found.token_ids.tolist() == list(range(1, 11))
    assert found.values.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert (found.smallest_distance, found.largest_distance) == (1, 9)
    spaced = number_tokens(tokenizer, space_prefixed=True)
    assert spaced.token_ids.tolist() == [*range(1, 11), tokens.index("Ġ3")]
    assert (spaced.values[-1], spaced.after_space.tolist()) == (3, [False] * 10 + [True])
    whole = number_tokens(tokenizer, digit_level=False)
    named = dict(zip([list(tokenizer.vocab)[i] for i in whole.token_ids], whole.values.tolist(), strict=True))
    assert named == {str(d): d for d in range(10)} | {"12": 12, "-3": -3, "1.5": 1.5, ".5": 0.5, "3.": 3, "007": 7}
    both = number_tokens(tokenizer, digit_level=False, space_prefixed=True)
    assert set(both.token_ids.tolist()) - set(whole.token_ids.tolist()) == {13 - 1, 13}
    assert both.values.tolist().count(12.0) == 2


def test_number_tokens_of_a_sentencepiece_vocabulary():
    tokenizer = Tokenizer(["<unk>", "▁", *(f"▁{digit}" for digit in range(10))])
    with pytest.raises(ValueError, match=r"no token for the digits 0, 1, .*, 9; .*add_tokens.*space_prefixed=True"):
        number_tokens(tokenizer)
    assert number_tokens(tokenizer, space_prefixed=True).values.tolist() == list(range(10))
    assert len(number_tokens(Tokenizer([b"0", *(str(digit).encode() for digit in range(1, 10)), b"\xff"])).values) == 10


def test_number_tokens_of_a_real_tokenizer():
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Backend(WordLevel({"[UNK]": 0, "one": 1, "7": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"has no token for the digits 0, 1, 2, 3, 4, 5, 6, 8, 9;"):
        number_tokens(tokenizer)
    tokenizer.add_tokens([digit for digit in "0123456789" if digit != "7"])
    found = number_tokens(tokenizer)
    assert found.token_ids.tolist() == list(range(2, 12))
    assert found.values.tolist() == [7, 0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert found.last_id < len(tokenizer)


WRONG = {
    "nothing": ({}, ValueError, "either tokenizer= or both token_ids= and values=, got tokenizer=NoneType"),
    "ids alone": ({"token_ids": [1]}, ValueError, r"both token_ids= and values="),
    "both": ({**DIGITS, "tokenizer": Tokenizer("0123456789")}, ValueError, "either tokenizer="),
    "no numbers": ({"tokenizer": Tokenizer("abc"), "digit_level": False}, ValueError, "has no token that is a number"),
    "no digits": ({"tokenizer": Tokenizer("abc")}, ValueError, "has no token for the digits 0, 1, "),
    "no tokenizer": ({"tokenizer": "gpt2"}, TypeError, r"must have get_vocab\(\), got str"),
    "tensor": ({"token_ids": torch.arange(2), "values": [0, 1]}, TypeError, "token_ids must be a list or tuple"),
    "lengths": ({"token_ids": [1, 2], "values": [1]}, ValueError, "got 2 ids, 2 of them different, and 1 values"),
    "twice": ({"token_ids": [1, 1], "values": [1, 2]}, ValueError, "no id twice"),
    "empty": ({"token_ids": [], "values": []}, ValueError, "not empty"),
    "negative": ({"token_ids": [-1], "values": [1]}, ValueError, "at least 0, got \\[-1\\]"),
    "infinite": ({"token_ids": [1], "values": [float("inf")]}, ValueError, "values must be finite"),
    "squash": (
        {**DIGITS, "squash_factor": 1.0},
        ValueError,
        "squash_factor must be a number above 1.*got 1.0",
    ),
    "squash of two": (
        {"token_ids": [1, 2], "values": [1, 2], "squash_factor": 2.0},
        ValueError,
        "three values or more",
    ),
    "filter": ({**DIGITS, "filter_eps": "none"}, ValueError, "filter_eps must be"),
    "unknown": (
        {**DIGITS, "squash": 1},
        ValueError,
        "unknown option squash for .*ntl_was.*squash_factor",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name):
    options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        get_loss("ntl_was", **options)


def test_wrong_arguments():
    logits, labels = torch.randn(3, CLASSES), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="p must be a number of at least 1, got 0.5"):
        get_loss("ntl_mse", p=0.5, **DIGITS)
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got \'average\''):
        number_token_loss(logits, labels, reduction="average", **DIGITS)
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        number_token_loss(logits, labels[:2], **DIGITS)
    with pytest.raises(ValueError, match="'cce' is no number token loss"):
        number_token_loss(logits, labels, "cce")
    with pytest.raises(ValueError, match="the number token 66 is none of the 60 classes of the logits"):
        number_token_loss(logits[:, :60], labels, **DIGITS)
    with pytest.raises(ValueError, match="label_smoothing, which the loss 'ntl_was' does not take"):
        get_loss("ntl_was", **DIGITS)(xhead.LazyLogits(logits, torch.eye(CLASSES)), labels, label_smoothing=0.1)
