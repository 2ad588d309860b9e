"""The head of vector-quantised logits against its dense definition in float64, with one code a token and with two."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.dense import relative_error
from tests.vq_case import D, N, V, dense, gradients, make, rows_and_labels
from xhead.heads.vq import VQHead
from xhead.heads.vq_config import MAPPINGS, TOKEN_BIASES, VQConfig
from xhead.losses.cross_entropy import linear_cross_entropy

RESIDUAL_SIZES = [0, 7]


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("token_bias", TOKEN_BIASES)
@pytest.mark.parametrize("residual_size", RESIDUAL_SIZES)
def test_loss_and_gradients(token_bias, scale, residual_size):
    head = make(token_bias=token_bias, residual_size=residual_size)
    hidden, labels = rows_and_labels(scale=scale)
    hidden.requires_grad_()
    upstream = torch.rand(N, dtype=torch.float64)
    actual = head.loss_rows(hidden, labels)
    expected = F.cross_entropy(dense(head, hidden), labels, reduction="none")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(
        gradients(actual @ upstream, head, hidden), gradients(expected @ upstream, head, hidden), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("token_bias", TOKEN_BIASES)
@pytest.mark.parametrize("residual_size", RESIDUAL_SIZES)
def test_float32(token_bias, residual_size):
    head = make(token_bias=token_bias, residual_size=residual_size)
    hidden, labels = rows_and_labels(rows=200)
    small = hidden.float().requires_grad_()
    exact = small.detach().double().requires_grad_()
    expected = head.loss_rows(exact, labels)
    wanted = gradients(expected.mean(), head, exact)
    head.float()
    actual = head.loss_rows(small, labels)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 1e-5
    for mine, theirs in zip(gradients(actual.mean(), head, small), wanted, strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_gradcheck(mapping):
    head = make(token_bias="learned", mapping=mapping).eval()
    hidden, labels = rows_and_labels(rows=4)

    def loss(hidden, codebook, bias):
        parameters = {"codebook": codebook, "token_bias": bias}
        return torch.func.functional_call(head, parameters, (hidden, lambda h, module: module.loss_rows(h, labels)))

    inputs = (hidden.requires_grad_(), head.codebook.detach().requires_grad_(), head.token_bias.detach())
    assert torch.autograd.gradcheck(loss, (*inputs[:2], inputs[2].requires_grad_()))


def test_gradcheck_of_two_codes():
    head = make(token_bias="learned", residual_size=4)
    hidden, labels = rows_and_labels(rows=4)

    def loss(hidden, codebook, residual_codebook, bias):
        parameters = {"codebook": codebook, "residual_codebook": residual_codebook, "token_bias": bias}
        return torch.func.functional_call(head, parameters, (hidden, lambda h, module: module.loss_rows(h, labels)))

    leaves = (head.codebook, head.residual_codebook, head.token_bias)
    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), *(x.detach().requires_grad_() for x in leaves)))


@pytest.mark.parametrize("token_bias", TOKEN_BIASES)
@pytest.mark.parametrize("residual_size", RESIDUAL_SIZES)
def test_probabilities(token_bias, residual_size):
    head = make(token_bias=token_bias, residual_size=residual_size)
    hidden = 3 * torch.randn(2, 7, D, dtype=torch.float64)
    log_p = head.log_probabilities(hidden)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 7, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_p, dense(head, hidden).log_softmax(-1))
    torch.testing.assert_close(head.logits(hidden), dense(head, hidden))
    torch.testing.assert_close(head(hidden).log_softmax(-1), log_p)
    values, found = head.topk(hidden, 4)
    torch.testing.assert_close(values, log_p.gather(-1, found))
    torch.testing.assert_close(values, log_p.sort(-1, descending=True).values[..., :4])
    labels = torch.randint(V, (7,))
    torch.testing.assert_close(-head.loss_rows(hidden[0], labels), log_p[0].gather(-1, labels[:, None])[:, 0])
    single = head.float().log_probabilities(hidden.float() / 3).double()
    torch.testing.assert_close(single.exp().sum(-1), torch.ones(2, 7, dtype=torch.float64), rtol=0, atol=1e-6)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40)
def test_any_mapping(data):
    size = data.draw(st.integers(1, 12))
    codes = data.draw(st.integers(1, size))
    mapping = [*range(codes), *data.draw(st.lists(st.integers(0, codes - 1), min_size=size - codes, max_size=size))]
    mapping = torch.tensor(mapping[:size])[torch.randperm(size)]
    token_bias = data.draw(st.sampled_from(TOKEN_BIASES))
    residual_size = data.draw(st.integers(0, size))
    head = VQHead(D, size, VQConfig(codes, "random", token_bias=token_bias, residual_size=residual_size)).double()
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size)))
    head.start_from(nn.Linear(D, size, dtype=torch.float64), token_counts=counts, token_code=mapping)
    hidden, labels = torch.randn(5, D, dtype=torch.float64), torch.randint(size, (5,))
    expected = F.cross_entropy(dense(head, hidden), labels, reduction="none")
    torch.testing.assert_close(head.loss_rows(hidden, labels), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head.log_probabilities(hidden).exp().sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_code_for_every_token_is_cut_cross_entropy(dtype):
    projection = nn.Linear(32, 200, bias=False, dtype=dtype)
    head = VQHead(32, 200, VQConfig(200)).to(dtype)
    head.start_from(projection, token_code=torch.arange(200))
    assert torch.equal(head.codebook, projection.weight)
    hidden, labels = torch.randn(100, 32, dtype=dtype, requires_grad=True), torch.randint(200, (100,))
    actual = head.loss_rows(hidden, labels)
    expected = linear_cross_entropy(hidden, projection.weight, labels, reduction="none")
    assert torch.equal(actual, expected)
    mine = torch.autograd.grad(actual.sum(), (hidden, head.codebook))
    theirs = torch.autograd.grad(expected.sum(), (hidden, projection.weight))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    with torch.no_grad():
        assert torch.equal(head.logits(hidden), projection(hidden))


@pytest.mark.parametrize("residual_size", RESIDUAL_SIZES)
def test_nothing_of_rows_and_tokens_is_built(residual_size):
    many = 50_000
    head = make(dtype=torch.float32, tokens=many, token_bias="frequency", residual_size=residual_size)
    hidden, labels = torch.randn(512, D, requires_grad=True), torch.randint(many, (512,))
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            largest.extend(each.numel() for each in outs if isinstance(each, torch.Tensor))
            return out

    with Sizes():
        head.loss_rows(hidden, labels).sum().backward()
    assert max(largest) <= 4 * many


@pytest.mark.parametrize("residual_size", RESIDUAL_SIZES)
def test_empty_batch(residual_size):
    head = make(residual_size=residual_size)
    hidden = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    head.loss_rows(hidden, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert not head.codebook.grad.any()


@pytest.mark.parametrize("residual_size", RESIDUAL_SIZES)
def test_rows_that_are_not_finite_give_nan(residual_size):
    head = make(token_bias="frequency", residual_size=residual_size)
    hidden, labels = rows_and_labels(rows=3)
    hidden[0, 1], hidden[2, 3] = torch.nan, torch.inf
    assert head.loss_rows(hidden, labels).isnan().tolist() == [True, False, True]
    assert head.log_probabilities(hidden).isnan().any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("residual_size", RESIDUAL_SIZES)
def test_labels_out_of_range(residual_size):
    for label in (-1, V):
        with pytest.raises(IndexError, match=f"label {label} is out of bounds"):
            make(residual_size=residual_size).loss_rows(torch.zeros(1, D, dtype=torch.float64), torch.tensor([label]))
