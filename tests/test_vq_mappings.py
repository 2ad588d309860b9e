"""Mappings of tokens to codes: how they start, what they cost, and how they change in training."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xhead
from tests.tiny import tiny
from tests.vq_case import D, K, N, V, dense, make, rows_and_labels
from xhead.heads.codes import code_floor, make_mapping, revive
from xhead.heads.vq import VQHead
from xhead.heads.vq_config import TOKEN_BIASES, VQConfig


def counts_of(size):
    return torch.arange(size).flip(0) ** 2


@pytest.mark.parametrize("start", ["kmeans", "frequency", "random"])
@pytest.mark.parametrize(("codes", "frequent"), [(1, 0), (7, 0), (7, 3), (40, 39), (40, 0), (40, 40)])
def test_every_start_fills_every_code(start, codes, frequent):
    if start == "kmeans":
        pytest.importorskip("sklearn")
    found = make_mapping(start, codes, frequent, torch.randn(40, 4), counts_of(40))
    assert found.unique().tolist() == list(range(codes))
    for code in range(frequent):
        assert (found == code).nonzero().flatten().tolist() == [code]


def test_kmeans_finds_groups():
    pytest.importorskip("sklearn")
    group = torch.arange(60) % 4
    rows = 10 * torch.eye(4)[group] + 0.1 * torch.randn(60, 4)
    found = make_mapping("kmeans", 4, 0, rows, None)
    assert {tuple(sorted(group[found == code].unique().tolist())) for code in range(4)} == {(0,), (1,), (2,), (3,)}
    # Rows that are all the same leave clusters empty, and tokens fill them.
    assert make_mapping("kmeans", 3, 0, torch.ones(9, 2).unique(dim=0).repeat(9, 1), None).unique().tolist() == [
        0,
        1,
        2,
    ]


def test_frequency_keeps_like_counts_together():
    counts = counts_of(40)
    found = make_mapping("frequency", 5, 0, torch.randn(40, 4), counts)
    assert found.tolist() == sorted(found.tolist())
    held = torch.zeros(5).index_add(0, found, counts.float())
    assert held.max() < 0.5 * held.sum()


def test_codebook_starts_at_the_means():
    projection = nn.Linear(D, V, bias=False)
    head = VQHead(D, V, VQConfig(K, start="random"))
    head.start_from(projection)
    for code in range(K):
        torch.testing.assert_close(head.codebook[code], projection.weight[head.token_code == code].mean(0))


def test_learned_bias_starts_from_what_is_known():
    projection = nn.Linear(D, V)
    head = VQHead(D, V, VQConfig(K, start="random", token_bias="learned"))
    head.start_from(projection)
    torch.testing.assert_close(head.token_bias, projection.bias)
    counts = torch.arange(V)
    head.start_from(projection, token_counts=counts)
    within = head.token_bias - projection.bias
    for code in range(K):
        inside = head.token_code == code
        torch.testing.assert_close(within[inside].mean(), torch.zeros(()), rtol=0, atol=1e-6)
        torch.testing.assert_close(within[inside].softmax(0), (counts[inside] + 1) / (counts[inside] + 1).sum())


def test_revived_codes():
    token_code, weight = torch.tensor([0, 1, 1, 1, 2, 2, 2]), torch.tensor([9.0, 1, 5, 8, 7, 6, 2])
    found, moved = revive(token_code, weight, 5, frequent=1)
    assert moved == [(3, 3, 1), (4, 4, 2)]
    assert found.tolist() == [0, 1, 1, 3, 4, 2, 2]
    assert revive(token_code, weight, 3, frequent=1)[1] == []


def test_floor():
    token_code, counts = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([3.0, 1, 4, 0, 2, 2])
    p = counts / counts.sum()
    of_code = torch.tensor([4.0, 4.0, 4.0]) / 12
    expected = sum(-v * math.log(v / of_code[c]) for v, c in zip(p.tolist(), token_code, strict=True) if v)
    assert code_floor(token_code, counts) == pytest.approx(expected)
    sizes = torch.tensor([2.0, 1, 3])
    assert code_floor(token_code, counts, token_bias=False) == pytest.approx(float((p * sizes[token_code].log()).sum()))
    assert code_floor(torch.arange(6), counts) == 0
    with pytest.raises(ValueError, match="all zero"):
        code_floor(token_code, 0 * counts)


@pytest.mark.parametrize("token_bias", ["none", "frequency"])
def test_floor_bounds_the_loss(token_bias):
    """Text of exactly these counts, from a head that knows every code: the floor is reached, never passed."""
    counts = torch.randint(1, 9, (V,))
    head = VQHead(K, V, VQConfig(K, start="random", token_bias=token_bias)).double()
    head.start_from(nn.Linear(K, V, dtype=torch.float64), token_counts=counts - 1)
    labels = torch.arange(V).repeat_interleave(counts)
    with torch.no_grad():
        head.codebook.copy_(torch.eye(K))
    for certainty in (0.0, 1.0, 1e3):
        hidden = certainty * F.one_hot(head.token_code[labels], K).double()
        loss = head.loss_rows(hidden, labels).mean().item()
        floor = code_floor(head.token_code, counts, token_bias=token_bias == "frequency")
        assert loss >= floor - 1e-9
    assert loss == pytest.approx(floor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size must be a whole number of at least 1, got 0"),
        ({"codebook_size": 2.5}, "codebook_size must be a whole number of at least 1, got 2.5"),
        ({"codebook_size": 97}, "codebook_size must be at most the number of tokens, 96, got 97"),
        ({"codebook_size": 8, "frequent": 9}, "frequent must be at most codebook_size=8, got 9"),
        ({"codebook_size": 8, "frequent": 8}, "leaves none of codebook_size=8 to the other 88 tokens"),
        ({"codebook_size": 8, "frequent": 2}, "frequent=2 needs token_counts="),
        ({"codebook_size": 8, "start": "frequency"}, 'start="frequency" needs token_counts='),
        ({"codebook_size": 8, "start": "k-means"}, "start must be one of kmeans, frequency, random, got 'k-means'"),
        ({"codebook_size": 8, "token_bias": "both"}, "token_bias must be one of none, frequency, learned, got 'both'"),
        ({"codebook_size": 8, "mapping": "moving"}, "mapping must be one of fixed, reassigned, learned"),
        ({"codebook_size": 8, "reassign_every": 0}, "reassign_every must be a whole number of at least 1, got 0"),
        ({"codebook_sise": 8}, "unknown option codebook_sise for head 'vq'; known are codebook_size, start"),
        ({}, "the head 'vq' needs the option codebook_size"),
        ({"codebook_size": 8, "token_counts": torch.ones(95), "frequent": 1}, r"shape \(96,\).*got \(95,\)"),
        (
            {"codebook_size": 8, "token_counts": -torch.ones(96), "frequent": 1},
            "finite and not negative, got values from -1",
        ),
        ({"codebook_size": 8, "token_counts": torch.full((96,), torch.inf), "frequent": 1}, "finite and not negative"),
        ({"codebook_size": 8, "residual_size": -1}, "residual_size must be a whole number of at least 0, got -1"),
        ({"codebook_size": 8, "residual_size": 97}, "residual_size must be at most the number of tokens, 96, got 97"),
        ({"codebook_size": 8, "residual_size": 4, "mapping": "learned"}, 'with residual_size=4 it must be "fixed"'),
        (
            {"codebook_size": 8, "residual_code": torch.zeros(96).long()},
            "residual_code needs a head with residual_size",
        ),
        (
            {"codebook_size": 8, "residual_size": 4, "residual_code": torch.arange(96)},
            r"residual_code must be in \[0, 4\).*from 0 to 95",
        ),
        ({"codebook_size": 8, "token_code": torch.arange(96)}, r"must be in \[0, 8\).*got values from 0 to 95"),
        ({"codebook_size": 8, "token_code": torch.arange(96) % 8 - 1}, "got values from -1 to 6"),
        ({"codebook_size": 8, "token_code": torch.arange(96) % 6}, "2 of 8 codes have no token.*codebook_size to 6"),
        ({"codebook_size": 8, "token_code": torch.arange(95) % 8}, r"shape \(96,\), one code a token, got \(95,\)"),
        ({"codebook_size": 8, "token_code": torch.zeros(96)}, "a tensor of torch.int64, got torch.float32"),
    ],
)
def test_wrong_options(options, message):
    model = tiny("LlamaForCausalLM")
    options = {"start": "random", **options} if "codebook_size" in options else options
    with pytest.raises((ValueError, TypeError), match=message):
        xhead.patch(model, head="vq", **options)
    assert type(model.lm_head) is nn.Linear
    assert not hasattr(model.config, "xhead_head")


def test_a_projection_that_is_not_finite():
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="the projection has 1 weights that are not finite"):
        xhead.patch(model, head="vq", codebook_size=8)


# Mappings that change.


def grouped(rows=4000, groups=4, size=24):
    """Hidden states that say the group of the label, and no more; (rows, D), (rows,), (size,)."""
    group = torch.arange(size) % groups
    labels = torch.randint(size, (rows,))
    hidden = 3 * torch.eye(D)[group[labels]] + 0.3 * torch.randn(rows, D)
    return hidden, labels, group


def trained(mapping, steps=160, **options):
    torch.manual_seed(1)
    hidden, labels, group = grouped()
    head = VQHead(D, 24, VQConfig(4, start="random", mapping=mapping, reassign_every=20, **options))
    head.start_from(nn.Linear(D, 24))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for step in range(steps):
        chosen = slice(200 * (step % 20), 200 * (step % 20 + 1))
        optimizer.zero_grad()
        head.loss_rows(hidden[chosen], labels[chosen]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return head, head.loss_rows(hidden, labels).mean().item(), group


@pytest.mark.parametrize("mapping", ["reassigned", "learned"])
@pytest.mark.parametrize("token_bias", ["none", "learned"])
def test_a_changing_mapping_finds_the_groups(mapping, token_bias):
    fixed = trained("fixed", token_bias=token_bias)[1]
    head, loss, _ = trained(mapping, token_bias=token_bias)
    assert head.token_code.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(head.code_weight, torch.bincount(head.token_code))
    assert loss < fixed - 0.3, (loss, fixed)
    assert loss < math.log(6) + 0.5


def test_contexts_measure_what_a_move_is_worth():
    """For a rare token, the gain that decides is the change of the log-likelihood itself."""
    head = make(mapping="reassigned", tokens=200, codebook_size=4).train()
    hidden, labels = torch.randn(900, D, dtype=torch.float64), torch.randint(3, 200, (900,))
    labels[:2] = 0
    before = head.loss_rows(hidden, labels).sum()
    context = head._context
    old = head.token_code.clone()
    for code in range(4):
        moved = old.clone()
        moved[0] = code
        head.remap(moved)
        truth = before - head.eval().loss_rows(hidden, labels).sum()
        gains = context.hidden_sum[0] @ head.codebook.T - context.mass
        torch.testing.assert_close(gains[code] - gains[old[0]], truth, rtol=0.15, atol=0.15)


def test_straight_through_gradient_is_that_of_rows_in_the_codes_place():
    for token_bias in TOKEN_BIASES:
        head = make(mapping="learned", token_bias=token_bias).train()
        hidden, labels = rows_and_labels()
        upstream = torch.rand(N, dtype=torch.float64)
        actual = torch.autograd.grad(head.loss_rows(hidden, labels) @ upstream, (head.token_rows, head.codebook))
        rows = head.codebook[head.token_code].detach().requires_grad_()
        logits = hidden @ rows.T + (dense(head, hidden) - hidden @ rows.T).detach()
        expected = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="none") @ upstream, rows)
        torch.testing.assert_close(actual[0], expected[0])
        of_codes = torch.zeros_like(head.codebook).index_add(0, head.token_code, expected[0])
        torch.testing.assert_close(actual[1], of_codes)


@pytest.mark.parametrize("mapping", ["reassigned", "learned"])
def test_empty_codes_are_revived_and_said(mapping, caplog):
    head = make(mapping=mapping, frequent=1, reassign_every=1, token_bias="frequency").train()
    own = (head.token_code == 0).nonzero().flatten()
    hidden, labels = rows_and_labels()
    head.loss_rows(hidden, labels)
    with torch.no_grad():  # one code is best for every token
        head.codebook[1:] = torch.arange(1.0, K, dtype=torch.float64)[:, None] * 1e-3
        if mapping == "learned":
            head.token_rows.fill_(1.0)
        else:
            head._context.hidden_sum.fill_(1.0)
            head._context.counts.fill_(1.0)
            head._context.mass.fill_(0.0)
    with caplog.at_level(logging.WARNING, logger="xhead"):
        head.loss_rows(hidden, labels)
    assert "4 of 6 codes were empty and took a token each" in caplog.text
    assert head.token_code.unique().tolist() == list(range(K))
    assert torch.equal((head.token_code == 0).nonzero().flatten(), own)
    expected = F.cross_entropy(dense(head, hidden), labels, reduction="none")
    torch.testing.assert_close(head.eval().loss_rows(hidden, labels), expected)


def test_a_mapping_changes_in_training_alone():
    head = make(mapping="reassigned", reassign_every=1)
    hidden, labels = rows_and_labels(rows=500)
    before = head.token_code.clone()
    head.eval().loss_rows(hidden, labels)
    with torch.no_grad():
        head.train().loss_rows(hidden, labels)
    with pytest.raises(RuntimeError, match='mapping="reassigned" has nothing to reassign by'):
        head.reassign()
    with pytest.raises(RuntimeError, match='mapping="fixed" has nothing to reassign by'):
        make().reassign()
    assert torch.equal(head.token_code, before)
    loss = head.loss_rows(hidden, labels).sum() + head.loss_rows(hidden, labels).sum()
    assert not torch.equal(head.token_code, before)
    loss.backward()
