"""The number token loss a number: against a reading of the labels digit by digit, and the package ntloss."""

import pytest
import torch

import xhead
from tests.dense import dense_logits, relative_error
from tests.test_number_tokens import DIGITS, LOSSES, UNEVEN, Tokenizer, assert_same
from xhead.losses import get_loss
from xhead.losses.number_tokens import number_token_loss

POINT = 7
CLASSES, SIZE, LENGTH = 67, 9, 24
DIGIT_ID = dict(zip("0123456789", DIGITS["token_ids"], strict=True))


def encode(text):
    """One token a character: digits and the point as they are, `#` an ignored one, anything else a word."""
    return torch.tensor([DIGIT_ID.get(c, {".": POINT, "#": -100}.get(c, 20)) for c in text.ljust(LENGTH)])


TEXTS = [
    "12.34 7 and 007 90.0.5",
    "5 a 1.. 2 .3 4.",
    "1#2 3#.4 #5.#6 0 00",
    "99999999999999999999",
    "word",
    "123456789012345678901234",
]


def numbers_of(text, float_level):
    """The places of the digits of each number in the text."""
    text, runs = text.ljust(LENGTH), []
    for place, character in enumerate(text):
        if character not in DIGIT_ID:
            continue
        after_digit = bool(runs) and runs[-1][-1] == place - 1
        after_point = float_level and bool(runs) and runs[-1][-1] == place - 2 and text[place - 1] == "."
        if after_digit or after_point:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def definition(logits, texts, float_level=False, reweigh=False, most=20):
    """(B, T): number after number."""
    ids = DIGITS["token_ids"]
    values = torch.arange(10.0, dtype=torch.float64)
    loss = logits.sum(-1) * 0
    for line, text in enumerate(texts):
        for places in numbers_of(text, float_level):
            actual, predicted = 0.0, 0.0
            for index, place in enumerate(places):
                worth = 10.0 ** min(len(places) - 1 - index, most - 1)
                actual += worth * float(text[place])
                predicted = predicted + worth * (torch.softmax(logits[line, place, ids], 0) * values).sum()
            error = (actual - predicted).abs() / (actual + predicted + torch.finfo(torch.float64).eps)
            if reweigh:
                mass = torch.softmax(logits[line, places[0]], 0)[ids].sum()
                error = error * mass + 1.01 * (1 - mass)
            loss = loss.index_put((torch.tensor(line), torch.tensor(places[0])), error)
    return loss


def inputs(dtype=torch.float64):
    hidden = torch.randn(len(TEXTS), LENGTH, SIZE, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(CLASSES, SIZE, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.stack([encode(text) for text in TEXTS])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reweigh", [False, True])
@pytest.mark.parametrize("float_level", [False, True])
def test_values_and_gradients(float_level, reweigh, dtype):
    hidden, weight, labels = inputs(dtype)
    exact = definition(
        dense_logits(hidden.flatten(0, 1), weight).unflatten(0, labels.shape), TEXTS, float_level, reweigh
    )
    options = {"float_level": float_level, "point_id": POINT, "reweigh": reweigh, **DIGITS}
    for engine in ("reference", "chunked") if dtype == torch.float64 else ("chunked",):
        logits = xhead.LazyLogits(hidden, weight)
        found = number_token_loss(logits, labels, "ntl_number", reduction="none", engine=engine, **options)
        assert_same(found, exact, (hidden, weight), 1e-9 if dtype == torch.float64 else 1e-5)
        assert torch.equal(found != 0, exact != 0)
        count = sum(len(numbers_of(text, float_level)) for text in TEXTS)
        mean = number_token_loss(logits, labels, "ntl_number", engine=engine, **options)
        assert relative_error(mean, exact.sum() / count) < 1e-5


def test_long_numbers_and_a_zero_predicted_to_the_last_bit():
    hidden, weight, labels = inputs()
    dense = dense_logits(hidden.flatten(0, 1), weight).unflatten(0, labels.shape)
    found = number_token_loss(dense, labels, "ntl_number", max_number_length=3, reduction="none", **DIGITS)
    assert torch.allclose(found, definition(dense, TEXTS, most=3))
    certain = torch.full((1, 1, CLASSES), -1e4)
    certain[..., DIGIT_ID["0"]] = 1e4
    certain.requires_grad_()
    loss = number_token_loss(certain, torch.tensor([[DIGIT_ID["0"]]]), "ntl_number", **DIGITS)
    assert loss == 0
    assert torch.isfinite(torch.autograd.grad(loss, certain)[0]).all()


def test_a_digit_after_a_space_begins_a_number():
    tokenizer = Tokenizer([*"0123456789", *(f"▁{digit}" for digit in range(10)), "x"])
    labels = torch.tensor([[11, 2, 13, 20, 4, 5]])  # 12 3, 45
    logits = torch.randn(1, 6, 21, dtype=torch.float64)
    rows = number_token_loss(logits, labels, "ntl_number", tokenizer=tokenizer, space_prefixed=True, reduction="none")
    assert (rows[0] != 0).tolist() == [True, False, True, False, True, False]


def test_wrong_options():
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 9, got \[-3.0, 0.5, 12.0, 345.0\]"):
        get_loss("ntl_number", **UNEVEN)
    with pytest.raises(ValueError, match="max_number_length must be from 1 to 38, got 0"):
        get_loss("ntl_number", max_number_length=0, **DIGITS)
    with pytest.raises(ValueError, match="none is known, give point_id="):
        get_loss("ntl_number", float_level=True, **DIGITS)
    with pytest.raises(ValueError, match="none is known, give point_id="):
        get_loss("ntl_number", float_level=True, tokenizer=Tokenizer("0123456789"))
    assert get_loss("ntl_number", float_level=True, tokenizer=Tokenizer("0123456789.")).config.point_id == 10


class PackageTokenizer(Tokenizer):
    """What ntloss asks of a tokenizer."""

    def __len__(self):
        return len(self.vocab)

    def add_tokens(self, tokens):
        return sum(token not in self.vocab for token in tokens)

    def convert_tokens_to_ids(self, token):
        return self.vocab[token]


MULTI = ["<s>", *"0123456789", "12", "345", "1.5", "-3", "007", ".", "word"]


@pytest.mark.parametrize("reweigh", [False, True])
@pytest.mark.parametrize("digit_level", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "number", "number, floats"])
def test_the_package_agrees(name, digit_level, reweigh):
    ntloss = pytest.importorskip("ntloss")
    tokenizer = PackageTokenizer(MULTI)
    shared = {"tokenizer": tokenizer, "reweigh": reweigh}
    loss, options = LOSSES.get(name, ("ntl_number", {"float_level": "floats" in name}))
    level = {} if loss == "ntl_number" else {"digit_level": digit_level}
    if loss == "ntl_was":
        theirs = ntloss.NTLoss(**shared, **level, **options)
    elif loss == "ntl_number":
        theirs = ntloss.core.NumberLevelLoss(**shared, **options)
    else:
        p = options.get("p", 2 if loss == "ntl_mse" else 1)

        def power(mean, target, reduction="mean"):
            return (mean - target).abs() ** p

        theirs = ntloss.NTLossDotProduct(**shared, **level, loss_function=power)
    logits = torch.randn(3, 40, len(MULTI), requires_grad=True)
    labels = torch.randint(len(MULTI), (3, 40))
    labels[torch.rand(3, 40) < 0.1] = -100
    for reduction in ("none", "sum", "mean"):
        expected = theirs(logits, labels, reduction=reduction)
        found = number_token_loss(logits, labels, loss, reduction=reduction, **shared, **level, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(each.sum(), logits)[0] for each in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6 * float(expected.detach().abs().max()))
