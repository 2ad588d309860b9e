"""The Fourier head in a language model: a range of its tokens or all of them, beside the dense definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xhead
from tests.dense import relative_error
from tests.test_fourier import direct_log_probs
from tests.tiny import tiny, tokens
from xhead.heads import make_head, read_options

RANGES = [None, (0, 40), (30, 96), (20, 60), (60, 62)]
WIDTH, CLASSES = 6, 96


def made(token_range, dtype=torch.float64, **options):
    frequencies = 1 if token_range == (60, 62) else 7
    options = {"num_frequencies": frequencies, "token_range": token_range, "init_scale": 1.0, **options}
    config, _ = read_options("fourier", options)
    return make_head("fourier", WIDTH, CLASSES, config).to(dtype)


def direct(head, hidden):
    """Log-probabilities of all tokens, (n, V): the outer softmax times the Fourier head's distribution."""
    inside = direct_log_probs(head.fourier, hidden)
    if head.dense is None:
        return inside
    outer = F.linear(hidden, head.dense.weight, head.dense.bias).double().log_softmax(-1)
    first = head.first
    return torch.cat((outer[:, :first], outer[:, -1:] + inside, outer[:, first:-1]), -1)


@pytest.mark.parametrize("token_range", RANGES)
def test_loss_and_logits_are_the_formula(token_range):
    head = made(token_range)
    hidden = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randperm(CLASSES)
    expected = direct(head, hidden)
    assert torch.allclose(expected.logsumexp(-1), torch.zeros(CLASSES).double())
    assert torch.allclose(head(hidden).log_softmax(-1), expected, atol=1e-10)
    rows = head.loss_rows(hidden, labels)
    dense = -expected[range(CLASSES), labels]
    assert torch.allclose(rows, dense, atol=1e-10)
    operands = (hidden, *head.parameters())
    upstream = torch.rand(CLASSES, dtype=torch.float64)
    true = torch.autograd.grad(dense, operands, upstream)
    for mine, right in zip(torch.autograd.grad(rows, operands, upstream), true, strict=True):
        assert relative_error(mine, right) < 1e-9
    single = made(token_range, torch.float32)
    single.load_state_dict(head.state_dict())
    found = torch.autograd.grad(
        single.loss_rows(hidden.float(), labels), (hidden, *single.parameters()), upstream.float()
    )
    for mine, right in zip(found, true, strict=True):
        assert relative_error(mine, right) < 2e-5
    assert torch.autograd.gradcheck(lambda h: head.loss_rows(h, labels[:3]), (hidden[:3].detach().requires_grad_(),))
    assert head.loss_rows(hidden[:0], labels[:0]).shape == (0,)


def test_penalty_is_of_the_rows_inside():
    plain, smooth = made((20, 60)), made((20, 60), regularization=0.1)
    smooth.load_state_dict(plain.state_dict())
    hidden, labels = torch.randn(4, WIDTH, dtype=torch.float64), torch.tensor([3, 20, 59, 60])
    more = (smooth.loss_rows(hidden, labels) - plain.loss_rows(hidden, labels)) > 0
    assert more.tolist() == [False, True, True, False]


def test_start_from_the_projection():
    head, projection = made((20, 60)), nn.Linear(WIDTH, CLASSES).double()
    head.start_from(projection)
    hidden = torch.randn(5, WIDTH, dtype=torch.float64)
    outside = torch.ones(CLASSES).bool()
    outside[20:60] = False
    assert torch.allclose(head(hidden)[:, outside], projection(hidden)[:, outside])
    gate = head(hidden)[:, 20:60].logsumexp(-1)
    assert torch.allclose(gate, projection(hidden)[:, 20:60].mean(-1) + math.log(40))


@pytest.mark.parametrize("token_range", [None, (20, 60)])
@pytest.mark.parametrize("tied", [True, False])
def test_in_a_model(token_range, tied, tmp_path):
    options = {"num_frequencies": 9, "token_range": token_range, "regularization": 1e-6}
    model = xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=tied).eval(), head="fourier", **options)
    loss = model(**tokens()).loss
    loss.backward()
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (1, 0)
    with torch.no_grad():
        out = model(**tokens())
    assert torch.allclose(out.loss, loss, atol=1e-3)  # but for the penalty
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    for how in ({}, {"do_sample": True}, {"num_beams": 3}):
        ids = model.generate(tokens()["input_ids"], max_new_tokens=4, pad_token_id=0, **how)
        assert ids.shape == (2, 16)
    model.save_pretrained(tmp_path)
    again = xhead.load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**tokens()).logits, model(**tokens()).logits)
    assert torch.equal(again(**tokens()).loss, model(**tokens()).loss)
    assert again.lm_head.fourier.bins.regularization == 1e-6
    assert isinstance(xhead.unpatch(model).lm_head, nn.Linear)


def test_half_precision_and_autocast():
    model = xhead.patch(tiny("LlamaForCausalLM").eval(), head="fourier", num_frequencies=9, token_range=(10, 90))
    expected = model(**tokens()).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tokens()).loss
    loss.backward()
    assert torch.allclose(loss, expected, rtol=0.02)
    half = model.bfloat16()
    half(**tokens()).loss.backward()
    with torch.no_grad():
        out = half(**tokens())
    assert out.logits.dtype == torch.bfloat16
    assert torch.allclose(out.loss.float(), expected, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frequencies": 9, "token_range": (20, 97)}, r"\(20, 97\), beyond the vocabulary of 96 tokens"),
        ({"num_frequencies": 9, "token_range": (20, 20)}, "0 <= first < stop, got"),
        ({"num_frequencies": 9, "token_range": (-1, 20)}, "0 <= first < stop, got"),
        ({"num_frequencies": 9, "token_range": (1, 2, 3)}, "two token ids"),
        ({"num_frequencies": 9, "token_range": (1.0, 20)}, "two token ids"),
        ({"num_frequencies": 40, "token_range": (20, 60)}, "40 bins can carry at most 39"),
        ({"num_frequencies": 96}, "96 bins can carry at most 95"),
        ({"num_frequencies": 9, "bins": 3}, "unknown option bins for head 'fourier'; known are num_frequencies"),
    ],
)
def test_wrong_options(options, message):
    model = tiny("LlamaForCausalLM")
    with pytest.raises(ValueError, match=message):
        xhead.patch(model, head="fourier", **options)
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(TypeError, match="num_frequencies"):
        xhead.patch(model, head="fourier")


def test_wrong_labels():
    for token_range in (None, (20, 60)):
        with pytest.raises(IndexError, match="label 96 is out of bounds"):
            made(token_range).loss_rows(torch.randn(2, WIDTH, dtype=torch.float64), torch.tensor([1, 96]))
