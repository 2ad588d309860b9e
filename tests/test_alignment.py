"""Token log-probabilities and the losses made of them, against their formulas in float64."""

import math

import pytest
import torch

import xhead
from tests.dense import dense_logits, dense_statistic, relative_error
from tests.tiny import assert_same_gradients, tokens, twins
from xhead.losses import alignment

LEAD, CLASSES, SIZE = (3, 13), 307, 7


def inputs(dtype=torch.float64, lead=LEAD, classes=CLASSES):
    hidden, weight, bias = (
        (2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape in ((*lead, SIZE), (classes, SIZE), (classes,))
    )
    labels = torch.randint(classes, lead)
    labels[torch.rand(lead) < 0.3] = -100
    return hidden, weight, bias, labels


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens(dtype, engine):
    slack = 1e-9 if dtype == torch.float64 else 1e-5
    hidden, weight, bias, labels = inputs(dtype)
    lazy = xhead.LazyLogits(hidden, weight, bias, softcap=5.0)
    counted = labels != -100
    logits = dense_logits(hidden, weight, bias, softcap=5.0)
    logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * counted
    entropy = dense_statistic("entropy", logits.flatten(0, 1)).reshape(LEAD)
    upstream = torch.randn(LEAD, dtype=torch.float64)
    for found, true in (
        (alignment.token_logprobs(lazy, labels, engine=engine), logprobs),
        (alignment.token_entropy(lazy, engine=engine), entropy),
        (alignment.token_entropy(lazy, counted, engine=engine), entropy * counted),
    ):
        assert found.dtype == dtype and found.shape == LEAD
        assert relative_error(found, true) < slack
        mine = torch.autograd.grad(found, (hidden, weight, bias), upstream.to(dtype))
        exact = torch.autograd.grad(true, (hidden, weight, bias), upstream, retain_graph=True)
        for one, other in zip(mine, exact, strict=True):
            assert relative_error(one, other) < slack


def test_tokens_by_finite_differences():
    hidden, weight, bias, labels = inputs(lead=(2, 3), classes=5)
    assert torch.autograd.gradcheck(
        lambda *operands: alignment.token_logprobs(xhead.LazyLogits(*operands), labels), (hidden, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda *operands: alignment.token_entropy(xhead.LazyLogits(*operands)), (hidden, weight, bias)
    )


def test_no_tokens():
    hidden, weight, bias, labels = inputs()
    for part in (hidden[:0], hidden):
        found = alignment.token_logprobs(
            xhead.LazyLogits(part, weight, bias), torch.full_like(labels, -100)[: len(part)]
        )
        assert found.shape == part.shape[:-1] and not found.any()
        assert all(
            not g.any()
            for g in torch.autograd.grad(found.sum(), (hidden, weight, bias), allow_unused=True)
            if g is not None
        )
    with pytest.raises(IndexError, match=f"target {CLASSES} is out of bounds"):
        alignment.token_logprobs(xhead.LazyLogits(hidden, weight), torch.full_like(labels, CLASSES))


def test_a_patched_model_learns_a_preference():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    ids, labels = tokens(4)["input_ids"], tokens(4)["labels"][:, 1:]
    mask = labels != -100
    stock = plain(ids).logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    ours = alignment.token_logprobs(model(ids).logits[:, :-1], labels)
    for logprobs in (ours, stock):
        policy = alignment.sequence_logprobs(logprobs, mask)
        reference = policy.detach() + torch.tensor([0.5, -0.5, 1.0, 2.0])
        alignment.dpo(policy[:2], policy[2:], reference[:2], reference[2:]).mean().backward()
    assert_same_gradients(model, plain)
    assert xhead.status(model).materialized == 0


def scores(count=6):
    return [(3 * torch.randn(count, dtype=torch.float64) - 4).requires_grad_() for _ in range(4)]


def sigmoid(value):
    return 1 / (1 + torch.exp(-value))


def odds(logprob):
    return torch.exp(logprob) / (1 - torch.exp(logprob))


def test_preferences():
    c, r, rc, rr = scores()
    beta = 0.3
    ratio = torch.log((torch.exp(c) / torch.exp(rc)) / (torch.exp(r) / torch.exp(rr)))
    assert torch.allclose(alignment.dpo(c, r, rc, rr, beta=beta), -torch.log(sigmoid(beta * ratio)))
    assert torch.allclose(alignment.ipo(c, r, rc, rr, beta=beta), (ratio - 1 / (2 * beta)) ** 2)
    assert torch.allclose(alignment.simpo(c, r, beta=2.5, gamma=0.7), -torch.log(sigmoid(2.5 * (c - r) - 0.7)))
    assert torch.autograd.gradcheck(alignment.dpo, (c, r, rc, rr))
    assert torch.autograd.gradcheck(alignment.ipo, (c, r, rc, rr))
    assert torch.autograd.gradcheck(alignment.simpo, (c, r))
    c, r = (-value.detach().abs().requires_grad_() for value in (c, r))
    defined = -c - 0.1 * torch.log(sigmoid(torch.log(odds(c) / odds(r))))
    assert torch.allclose(alignment.orpo(c, r), defined)
    assert torch.autograd.gradcheck(alignment.orpo, (c, r))


def test_extreme_preferences_are_finite():
    low, high = torch.full((2,), -1e3), torch.full((2,), -1e-6)
    for loss in (alignment.orpo, alignment.simpo):
        assert loss(low, high).isfinite().all() and loss(high, low).isfinite().all()
    zero = torch.zeros(2)
    assert torch.equal(alignment.dpo(zero, zero, zero, zero), torch.full((2,), math.log(2)))
    assert alignment.dpo(low, zero, zero, zero, beta=1.0).tolist() == [1e3, 1e3]


def test_kto():
    policy, reference, _, _ = scores()
    desirable = torch.tensor([True, False, True, True, False, False])
    for kl, baseline in ((torch.tensor(0.4).double(), 0.4), (torch.tensor(-3.0).double(), 0.0)):
        found = alignment.kto(policy, reference, desirable, kl, beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)
        reward = policy - reference
        value = torch.where(
            desirable, 1.3 * sigmoid(0.5 * (reward - baseline)), 0.7 * sigmoid(0.5 * (baseline - reward))
        )
        assert torch.allclose(found, torch.where(desirable, 1.3, 0.7) - value)
    assert torch.autograd.gradcheck(
        lambda p, r: alignment.kto(p, r, desirable, torch.tensor(0.4).double()), (policy, reference)
    )
    kl = torch.tensor(0.4, requires_grad=True)
    assert torch.autograd.grad(alignment.kto(policy, reference, desirable, kl).sum(), kl, allow_unused=True)[0] is None


def test_grpo():
    logprobs, old, reference = (-torch.rand(4, 5, dtype=torch.float64) * 3 for _ in range(3))
    mask = torch.rand(4, 5) < 0.7
    mask[:, 0], mask[3] = True, False
    rewards = torch.randn(2, 2, dtype=torch.float64)
    advantages = alignment.group_advantages(rewards)
    deviation = ((rewards - rewards.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True).sqrt()
    assert torch.allclose(advantages, (rewards - rewards.mean(1, keepdim=True)) / (deviation + 1e-4))
    advantages = advantages.flatten()
    rows = []
    for i in range(4):
        terms = []
        for t in range(5):
            if mask[i, t]:
                ratio = torch.exp(logprobs[i, t] - old[i, t])
                bounded = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
                kl = torch.exp(reference[i, t] - logprobs[i, t]) - (reference[i, t] - logprobs[i, t]) - 1
                terms.append(-(min(ratio * advantages[i], bounded * advantages[i]) - 0.04 * kl))
        rows.append(sum(terms) / len(terms) if terms else torch.tensor(0.0).double())
    logprobs.requires_grad_()
    garbage = old.masked_fill(~mask, -1e30), reference.masked_fill(~mask, float("inf"))
    found = alignment.grpo(logprobs, advantages, mask, old=garbage[0], reference=garbage[1])
    assert torch.allclose(found, torch.stack(rows))
    assert torch.autograd.gradcheck(
        lambda p: alignment.grpo(p, advantages, mask, old=old, reference=reference), (logprobs,)
    )
    (gradient,) = torch.autograd.grad(found.sum(), logprobs)
    assert gradient.isfinite().all() and not gradient[~mask].any()
    (on_policy,) = torch.autograd.grad(alignment.grpo(logprobs, advantages, mask).sum(), logprobs)
    share = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    assert torch.allclose(on_policy, -advantages[:, None] * share)


def test_sequences():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")], [-3.0, -5.0, -7.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert alignment.sequence_logprobs(logprobs, mask).tolist() == [-3.0, 0.0]
    assert alignment.sequence_logprobs(logprobs, mask, average=True).tolist() == [-1.5, 0.0]
    for wrong in (mask.long(), mask[:, :2]):
        with pytest.raises(RuntimeError, match=r"must be torch.bool of shape \(2, 3\), got .*labels != ignore_index"):
            alignment.sequence_logprobs(logprobs, wrong)
    with pytest.raises(RuntimeError, match=r"advantages must have shape \(2,\)"):
        alignment.grpo(logprobs, torch.ones(2, 3), mask)


def test_no_pairs():
    empty = torch.zeros(0)
    none = torch.zeros(0, dtype=torch.bool)
    for rows in (
        alignment.dpo(empty, empty, empty, empty),
        alignment.ipo(empty, empty, empty, empty),
        alignment.orpo(empty, empty),
        alignment.simpo(empty, empty),
        alignment.kto(empty, empty, none, torch.tensor(0.0)),
        alignment.grpo(empty[:, None], empty, none[:, None]),
    ):
        assert rows.shape == (0,)
