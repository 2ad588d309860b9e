"""Two codes a token: the range of the normaliser, and how the residual codes and both codebooks start."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.dense import relative_error
from tests.vq_case import D, N, V, dense, gradients, make, rows_and_labels
from xhead.heads.codes import make_mapping
from xhead.heads.residual_codes import fit_codebooks, make_residual_mapping
from xhead.heads.vq import VQHead
from xhead.heads.vq_config import VQConfig


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 90.0), (torch.float64, 900.0)])
@pytest.mark.parametrize("token_bias", ["none", "learned"])
def test_best_codes_that_no_token_has_together(dtype, apart, token_bias):
    """Tokens (0, 1), (1, 0) and (1, 1), and rows in which codes (0, 0) are far above all of them."""
    head = VQHead(2, 3, VQConfig(2, "random", token_bias=token_bias, residual_size=2)).to(dtype)
    head.remap(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]))
    with torch.no_grad():
        head.codebook.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.1]]))
        head.residual_codebook.copy_(torch.tensor([[1.0, 0.3], [0.0, 0.2]]))
    hidden = torch.tensor([[apart, 1.0], [0.5, -1.0], [2 * apart, 3.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    actual = head.loss_rows(hidden, labels)
    expected = F.cross_entropy(dense(head, hidden), labels, reduction="none")
    rounding = 5000 * torch.finfo(dtype).eps  # of logits of this size
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)
    wanted = gradients(expected.sum(), head, hidden)
    for mine, theirs in zip(gradients(actual.sum(), head, hidden), wanted, strict=True):
        assert relative_error(mine, theirs) < rounding
    total = head.log_probabilities(hidden.detach()).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_tokens_of_one_code_differ_by_context():
    one, two = make(token_bias="frequency"), make(token_bias="frequency", residual_size=V)
    first, second = (one.token_code == 0).nonzero().flatten()[:2].tolist()
    hidden = torch.randn(N, D, dtype=torch.float64)
    apart = one.log_probabilities(hidden)[:, first] - one.log_probabilities(hidden)[:, second]
    assert apart.std() < 1e-12
    two.remap(one.token_code, torch.arange(V))
    assert len(two.cells.unique()) == V
    assert (two.log_probabilities(hidden)[:, first] - two.log_probabilities(hidden)[:, second]).std() > 0.1


@pytest.mark.parametrize("start", ["kmeans", "frequency"])
@pytest.mark.parametrize(("codes", "frequent"), [(8, 0), (8, 3), (60, 60), (1, 0)])
def test_tokens_of_one_code_differ_in_the_other(start, codes, frequent):
    if start == "kmeans":
        pytest.importorskip("sklearn")
    rows, counts = torch.randn(60, 4), torch.arange(60)
    token_code = make_mapping(start, codes, frequent, rows, counts)
    for size in (5, 60):
        found = make_residual_mapping(start, token_code, size, rows, counts)
        assert found.min() >= 0 and found.max() < size
        for code in range(codes):
            taken = torch.bincount(found[token_code == code], minlength=size)
            assert taken.max() - taken.min() <= 1


def test_frequent_tokens_choose_first():
    pytest.importorskip("sklearn")
    rows, zeros = torch.tensor([0.0, 0.4, 10.0]).double()[:, None], torch.zeros(3, dtype=torch.int64)
    for first, second in ((0, 1), (1, 0)):
        counts = torch.tensor([0, 0, 0])
        counts[first], counts[second] = 9, 5
        found = make_residual_mapping("kmeans", zeros, 2, rows, counts)
        assert found[first] != found[2]  # the mean of both near rows; the other near row is left the far one
        assert found[second] == found[2]


def test_sums_of_codes_are_found_again():
    """Rows that are sums of two codebooks' rows, given the codes; and each frequent token's row, whatever it is."""
    token_code, residual_code = torch.arange(24) // 6, torch.arange(24) % 6
    first, second = torch.randn(4, D).double(), torch.randn(6, D).double()
    rows = first[token_code] + second[residual_code]
    found = fit_codebooks(rows, token_code, residual_code, 4, 6)
    torch.testing.assert_close(found[0][token_code] + found[1][residual_code], rows)
    projection = nn.Linear(D, V, bias=False).double()
    head = VQHead(D, V, VQConfig(8, "random", frequent=3, residual_size=4)).double()
    counts = torch.arange(V)
    head.start_from(projection, token_counts=counts)
    own = counts.argsort(descending=True)[:3]
    rows = head.codebook[head.token_code] + head.residual_codebook[head.residual_code]
    torch.testing.assert_close(rows[own], projection.weight[own])


def test_two_codebooks_are_nearer_to_a_projection():
    pytest.importorskip("sklearn")
    projection = nn.Linear(8, 300, bias=False).double()
    with torch.no_grad():  # tokens of fifteen kinds, in twenty forms each
        sums = torch.randn(15, 8)[torch.arange(300) % 15] + 0.5 * torch.randn(20, 8)[torch.arange(300) // 15]
        projection.weight.copy_(sums + 0.05 * torch.randn(300, 8))
    errors = []
    for sizes in ({"codebook_size": 40}, {"codebook_size": 20, "residual_size": 20}):
        head = VQHead(8, 300, VQConfig(**sizes)).double()
        head.start_from(projection)
        hidden = torch.randn(200, 8, dtype=torch.float64)
        errors.append(relative_error(head.logits(hidden), projection(hidden)))
    assert errors[1] < 0.8 * errors[0], errors


def test_codes_of_ones_own():
    token_code, residual_code = torch.arange(V) % 4, torch.arange(V) // 4
    head = VQHead(D, V, VQConfig(4, residual_size=6)).double()
    projection = nn.Linear(D, V).double()
    head.start_from(projection, token_code=token_code, residual_code=residual_code)
    assert torch.equal(head.cells, token_code * 6 + residual_code)
    hidden, labels = rows_and_labels()
    expected = F.cross_entropy(dense(head, hidden), labels, reduction="none")
    torch.testing.assert_close(head.loss_rows(hidden, labels), expected)
