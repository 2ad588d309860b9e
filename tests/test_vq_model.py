"""The head of vector-quantised logits inside models: patch, save, load, generate and train."""

import copy

import pytest
import torch
from torch import nn

import xhead
from tests.dense import relative_error
from tests.tiny import tiny, tokens
from tests.vq_case import model_with


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_bias": "frequency", "frequent": 3},
        {"token_bias": "learned"},
        {"token_bias": "learned", "residual_size": 9},
        {"token_bias": "frequency", "frequent": 3, "residual_size": 9},
    ],
)
def test_saved_and_loaded(options, tmp_path):
    model = model_with(**options)
    loss = model(**tokens()).loss
    with torch.no_grad():
        logits = model(**tokens()).logits
        torch.testing.assert_close(model(**tokens()).loss, loss)
    loss.backward()
    model.save_pretrained(tmp_path)
    again = xhead.load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**tokens()).logits, logits)
    assert torch.equal(again(**tokens()).loss, loss)
    assert torch.equal(again.lm_head.token_code, model.lm_head.token_code)
    assert xhead.status(model).materialized == 0


@pytest.mark.parametrize("residual_size", [0, 9])
def test_half_precision_keeps_the_counts(residual_size):
    model = model_with(token_bias="frequency", residual_size=residual_size).bfloat16()
    assert model.lm_head.code_weight.dtype == torch.int64
    log_p = model.lm_head.log_probabilities(torch.randn(3, 32, dtype=torch.bfloat16))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3), rtol=0, atol=1e-5)
    model(**tokens()).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        model_with(residual_size=residual_size)(**tokens()).loss.backward()


@pytest.mark.parametrize("residual_size", [0, 9])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
def test_generation(options, residual_size):
    model = model_with(token_bias="frequency", residual_size=residual_size)
    ids = tokens()["input_ids"]
    torch.manual_seed(3)
    actual = model.generate(ids, max_new_tokens=5, pad_token_id=0, **options)
    head = model.lm_head
    with torch.no_grad():
        stock = tiny("LlamaForCausalLM", tie_word_embeddings=False).eval()
        stock.model = model.model
        stock.lm_head = nn.Linear(32, 96)
        stock.lm_head.weight.copy_(head.codebook[head.token_code])
        if residual_size:
            stock.lm_head.weight += head.residual_codebook[head.residual_code]
        stock.lm_head.bias.copy_(head.token_weight.log())
    torch.manual_seed(3)
    assert torch.equal(actual, stock.generate(ids, max_new_tokens=5, pad_token_id=0, **options))


def test_from_a_trained_projection():
    pytest.importorskip("sklearn")
    plain = tiny("LlamaForCausalLM", tie_word_embeddings=False).eval()
    with torch.no_grad():  # words of eight kinds
        plain.lm_head.weight.copy_(0.3 * torch.eye(32)[torch.arange(96) % 8] + 0.01 * torch.randn(96, 32))
        expected = plain(**tokens()).logits
        model = xhead.patch(plain, head="vq", codebook_size=8)
        assert relative_error(model(**tokens()).logits, expected) < 0.3
        other = xhead.patch(xhead.unpatch(model), head="vq", codebook_size=8, start="random")
        assert relative_error(other(**tokens()).logits, expected) > 0.6


def test_training_in_a_model_moves_the_mapping():
    model = model_with(mapping="reassigned", reassign_every=2).train()
    before = model.lm_head.token_code.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for seed in range(12):
        optimizer.zero_grad()
        loss = model(**tokens(seed=seed % 2)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not torch.equal(model.lm_head.token_code, before)
    assert losses[-1] < losses[0]


def test_compiled():
    model = model_with(token_bias="frequency", residual_size=9)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    expected, actual = model(**tokens()).loss, compiled(**tokens()).loss
    torch.testing.assert_close(actual, expected)
    expected.backward()
    actual.backward()
    for mine, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert xhead.status(model).materialized == 0
