"""One gradient of the projection for many micro-batches: that of plain accumulation, refused where it would be lost."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import xhead
from tests.dense import relative_error
from tests.tiny import tiny, tokens, twins
from xhead.engines import deferral
from xhead.losses import get_loss

NAMES = ["zloss", "log_taylor", "log_spherical", "mse"]
CLASSES, SIZE = 700, 12


@pytest.fixture(autouse=True)
def _none_left():
    yield
    assert not deferral._pending


def head(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return nn.Linear(SIZE, CLASSES, bias=bias, dtype=dtype)


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, torch.randint(CLASSES, (rows,), generator=generator)) for rows in (30, 2, 50)]
    return [(torch.randn(rows, SIZE, generator=generator).bfloat16().to(dtype), labels) for rows, labels in shapes]


def rows(linear, hidden, labels, name="zloss", **options):
    return get_loss(name, engine="gram")(xhead.LazyLogits(hidden, linear.weight, linear.bias, **options), labels)


def gradients(linear, step, context):
    """Gradients of the parameters and the hidden states of a few backward passes in one context."""
    inputs = batches(linear.weight.dtype)
    linear.zero_grad(set_to_none=True)
    with context:
        for hidden, labels in inputs:
            step(linear, hidden.requires_grad_(), labels).mean().backward()
    return [parameter.grad for parameter in linear.parameters()] + [hidden.grad for hidden, _ in inputs]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_same_gradients(name, bias):
    linear = head(bias=bias)

    def step(linear, hidden, labels):
        return rows(linear, hidden, labels, name)

    plain = gradients(linear, step, nullcontext())
    ours = gradients(linear, step, xhead.accumulate(linear.weight))
    assert all(relative_error(mine, exact) < 1e-13 for mine, exact in zip(ours, plain, strict=True))


def test_different_scales_and_several_calls_of_one_graph():
    def step(linear, hidden, labels):
        return rows(linear, hidden, labels, "mse", scale=0.5) + rows(linear, 2 * hidden, labels, "log_taylor")

    linear = head()
    plain = gradients(linear, step, nullcontext())
    ours = gradients(linear, step, xhead.accumulate(linear.weight))
    assert all(relative_error(mine, exact) < 1e-13 for mine, exact in zip(ours, plain, strict=True))


def test_what_cannot_be_put_off_is_not_lost():
    """Another bias, a weighted mean, a loss with a pass over the classes, a copy of the weight."""
    other = torch.randn(CLASSES, dtype=torch.float64)

    def step(linear, hidden, labels):
        logits = xhead.LazyLogits(hidden, linear.weight, linear.bias)
        moved = xhead.LazyLogits(hidden, linear.weight, other)
        copied = xhead.LazyLogits(hidden, linear.weight * 1.5)
        weighted = logits.statistics("mean", mean_weight=other.abs())
        zloss = get_loss("zloss", engine="gram")
        softmax = get_loss("cce")(logits, labels)
        return zloss(logits, labels) + zloss(moved, labels) + zloss(copied, labels) + softmax + weighted.mean

    linear = head()
    plain = gradients(linear, step, nullcontext())
    ours = gradients(linear, step, xhead.accumulate(linear.weight))
    assert all(relative_error(mine, exact) < 1e-13 for mine, exact in zip(ours, plain, strict=True))


def test_the_gradient_comes_at_the_end_and_adds_to_what_is_there():
    linear = head()
    (hidden, labels), *_ = batches()
    rows(linear, hidden, labels).sum().backward()
    once = linear.weight.grad.clone()
    with xhead.accumulate(linear.weight):
        rows(linear, hidden, labels).sum().backward()
        assert torch.equal(linear.weight.grad, once)
    assert relative_error(linear.weight.grad, 2 * once) < 1e-13


@pytest.mark.parametrize("tied", [True, False])
def test_patched_model(tied):
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
    xhead.patch(plain, loss="zloss", a=0.5, b=2.0)
    xhead.patch(model, loss="zloss", a=0.5, b=2.0)
    for seed in range(3):
        plain(**tokens(seed=seed)).loss.backward()
    with xhead.accumulate(model):
        for seed in range(3):
            model(**tokens(seed=seed)).loss.backward()
    for mine, exact in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(mine.grad, exact.grad) < 1e-5
    assert xhead.status(model).materialized == 0


def test_training_is_the_same():
    """AdamW and clipping, which see whole gradients."""
    plain = xhead.patch(tiny("LlamaForCausalLM"), loss="zloss")
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(4):
            with xhead.accumulate(model) if model is ours else nullcontext():
                for micro in range(3):
                    model(**tokens(seed=10 * step + micro)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for mine, exact in zip(ours.parameters(), plain.parameters(), strict=True):
        assert relative_error(mine, exact) < 1e-4


def test_half_precision_is_collected_in_float32():
    linear = head(torch.bfloat16)
    exact = gradients(copy.deepcopy(linear).double(), rows, nullcontext())
    ours = gradients(linear, rows, xhead.accumulate(linear.weight))
    plain = gradients(linear, rows, nullcontext())
    assert ours[0].dtype == torch.bfloat16
    # One rounding, against one for each pass.
    assert relative_error(ours[0], exact[0]) < 2**-9 < relative_error(plain[0], exact[0])


def test_under_autocast_every_pass_makes_its_own():
    """The weight of a call is a copy there."""
    model = xhead.patch(tiny("LlamaForCausalLM"), loss="zloss")
    found = []
    for context in (nullcontext(), xhead.accumulate(model)):
        model.zero_grad()
        with context, torch.autocast("cpu", torch.bfloat16):
            model(**tokens()).loss.backward()
        found.append(model.lm_head.weight.grad.clone())
    assert torch.equal(*found) and found[0].any()


def test_frozen_head():
    model = xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=False), loss="zloss")
    model.lm_head.requires_grad_(False)
    with xhead.accumulate(model):
        model(**tokens()).loss.backward()
    assert model.lm_head.weight.grad is None and model.model.embed_tokens.weight.grad is not None


def test_small_batches_use_the_closed_form_inside():
    linear = head()
    problem = xhead.statistics.Problem(torch.randn(1, SIZE), linear.weight, ("mean", "variance"))
    assert xhead.engines.select("auto", problem) == "chunked"
    with xhead.accumulate(linear.weight):
        assert xhead.engines.select("auto", problem) == "gram"


def test_steps_and_changes_inside_are_refused():
    (hidden, labels), *_ = batches()

    def accumulate_and(linear, action):
        with xhead.accumulate(linear.weight):
            rows(linear, hidden, labels).sum().backward()
            action()

    linear = head()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    accumulate_and(linear, torch.optim.SGD(head().parameters(), lr=0.1).step)
    linear.zero_grad()
    with pytest.raises(RuntimeError, match=r"optimizer.step\(\) inside"):
        accumulate_and(linear, optimizer.step)
    assert linear.weight.grad is None
    for parameter in linear.parameters():
        with pytest.raises(RuntimeError, match="changed while its gradient"):
            accumulate_and(linear, lambda parameter=parameter: parameter.detach().add_(1.0))
    optimizer.step()


def test_refused_before_it_starts(monkeypatch):
    linear = head()
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"), xhead.accumulate(tiny("LlamaForCausalLM")):
        pass
    with pytest.raises(ValueError, match="must be a leaf"), xhead.accumulate(linear.weight * 2):
        pass
    with (
        pytest.raises(ValueError, match="being accumulated already"),
        xhead.accumulate(linear.weight),
        xhead.accumulate(linear.weight),
    ):
        pass
    handle = linear.weight.register_post_accumulate_grad_hook(lambda weight: None)
    with pytest.raises(ValueError, match="has gradient hooks"), xhead.accumulate(linear.weight):
        pass
    handle.remove()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="one of 2 processes"), xhead.accumulate(linear.weight):
        pass


def test_nothing_inside_changes_nothing():
    linear = head()
    with xhead.accumulate(linear.weight):
        pass
    assert linear.weight.grad is None
