"""The spherical head's steps are those of plain SGD on a dense weight, to rounding."""

import copy

import pytest
import torch
from torch import nn

from tests.dense import relative_error
from tests.spherical_case import CLASSES, RATES, SIZE, Dense, batch, make
from tests.spherical_definitions import MEMBERS, target_matrix
from xhead.heads import SphericalHead
from xhead.losses.spherical_family import spherical_loss

members = pytest.mark.parametrize(("name", "options", "definition"), MEMBERS)


@members
@pytest.mark.parametrize(("rows", "targets"), [(1, 1), (13, 3), (40, 3)])
def test_sixty_steps(name, options, definition, rows, targets):
    head = make(name, options, stabilise_every=5)
    rates = {"lr": RATES[name], "weight_decay": 0.1}
    dense = Dense(head, definition, options, **rates)
    for step in range(60):
        hidden, classes = batch(rows, targets, ignored=step % 7 == 3 and rows > 1)
        mine, true = hidden.detach().clone().requires_grad_(), hidden
        ours = head(mine, classes, reduction="none")
        kept = (classes != -100).any(1)
        expected = torch.where(kept, dense.rows(true, classes), 0.0)
        assert relative_error(ours, expected) < 1e-12
        upstream = torch.rand(rows, dtype=torch.float64)
        (ours * upstream).sum().backward()
        (expected * upstream).sum().backward()
        assert relative_error(mine.grad, true.grad) < 1e-10
        assert head.grad_norm() == pytest.approx(float(dense.weight.grad.norm()), rel=1e-10)
        factor = 1.0 - 0.5 * (step % 3)  # a schedule
        dense.optimizer.param_groups[0]["lr"] = rates["lr"] * factor
        head.step(rates["lr"] * factor, rates["weight_decay"])
        dense.step()
        assert relative_error(head.dense(), dense.weight) < 1e-10
    weight = dense.weight.detach()
    scale = weight.norm() / CLASSES**0.5
    assert (head.weight.mean_row - weight.mean(0)).norm() < 1e-10 * scale
    assert relative_error(head.weight.covariance, torch.cov(weight.T, correction=0)) < 1e-10
    assert relative_error(head.weight.mixing @ head.weight.inverse, torch.eye(SIZE)) < 1e-10


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("name", RATES)
def test_values_and_sparse_labels(name):
    options, definition = next((options, each) for other, options, each in MEMBERS if other == name)
    head = make(name, options)
    dense = Dense(head, definition, options, lr=RATES[name])
    hidden, classes = batch(9, 4)
    values = torch.rand(9, 4, dtype=torch.float64) - 0.2
    matrix = target_matrix(classes, CLASSES, values)
    expected = dense.rows(hidden, classes, values)
    for labels, given in ((classes, values), (matrix.to_sparse_csr(), None)):
        assert relative_error(head(hidden, labels, values=given, reduction="none"), expected) < 1e-12
    loss = head(hidden.detach(), matrix.to_sparse_csr(), reduction="sum")
    loss.backward()
    expected.sum().backward()
    head.step(RATES[name])
    dense.step()
    assert relative_error(head.dense(), dense.weight) < 1e-12


@pytest.mark.parametrize("bias", [1.0, 0.1])
def test_bias_is_a_constant_feature(bias):
    linear = nn.Linear(SIZE, CLASSES, dtype=torch.float64)
    head = SphericalHead.from_linear(linear, "log_taylor", bias=bias)
    assert torch.allclose(head.to_linear().weight, linear.weight)
    assert torch.allclose(head.to_linear().bias, linear.bias)
    hidden, classes = batch(8)
    assert torch.allclose(head(hidden), linear(hidden))
    loss = spherical_loss("log_taylor")
    for _ in range(5):
        optimizer = torch.optim.SGD([{"params": [linear.weight]}, {"params": [linear.bias], "lr": 0.3 * bias**2}], 0.3)
        scores = linear(hidden)
        stats = scores.mean(1), scores.var(1, correction=0), scores.gather(1, classes)
        optimizer.zero_grad()
        loss.rows(*stats, CLASSES).mean().backward()
        optimizer.step()
        head(hidden, classes).backward()
        head.step(0.3)
    assert relative_error(head.to_linear().weight, linear.weight) < 1e-12
    assert relative_error(head.to_linear().bias, linear.bias) < 1e-12
    plain = SphericalHead.from_linear(nn.Linear(SIZE, CLASSES, bias=False), "mse")
    assert plain.bias == 0.0 and plain.to_linear().bias is None


def test_scores_are_those_of_the_dense_weight_with_a_gradient():
    head = make()
    hidden, classes = batch(8)
    head(hidden, classes).backward()
    head.step(1.0)
    hidden = hidden.detach().reshape(2, 4, SIZE).requires_grad_()
    scores = head(hidden)
    assert scores.shape == (2, 4, CLASSES)
    assert torch.allclose(scores, hidden @ head.dense().T)
    assert torch.allclose(torch.autograd.grad(scores.sum(), hidden)[0], head.dense().sum(0).expand(2, 4, SIZE))


@pytest.mark.parametrize("rows", [5, 30])
def test_micro_batches_make_one_step(rows):
    whole, split = make("zloss"), make("zloss")
    split.load_state_dict(whole.state_dict())
    batches = [batch(rows, targets) for targets in (1, 3, 2)]
    for hidden, classes in batches:
        (split(hidden, classes, reduction="sum") / 7).backward()
    joined = torch.cat([hidden for hidden, _ in batches]).detach()
    padded = torch.cat([nn.functional.pad(classes, (0, 3 - classes.shape[1]), value=-100) for _, classes in batches])
    whole(joined, padded, num_items_in_batch=7).backward()
    assert relative_error(split.grad_norm(), whole.grad_norm()) < 1e-12
    for head in (whole, split):
        head.step(3.0, 0.01)
    assert relative_error(split.dense(), whole.dense()) < 1e-12


def test_two_uses_in_one_loss():
    head = make("mse")
    dense = Dense(head, MEMBERS[0][2], {}, lr=1e-3)
    first, second = batch(4), batch(6)
    (head(*first) + 2 * head(*second)).backward()
    (dense.rows(*first).mean() + 2 * dense.rows(*second).mean()).backward()
    assert relative_error(head.grad_norm(), dense.weight.grad.norm()) < 1e-12
    head.step(1e-3)
    dense.step()
    assert relative_error(head.dense(), dense.weight) < 1e-12


def test_gradients_that_are_not_the_heads():
    """`autograd.grad` for hidden states, no_grad, zero_grad and a frozen head leave nothing for the step."""
    head = make()
    before = head.dense()
    hidden, classes = batch(8)
    torch.autograd.grad(head(hidden, classes), hidden)
    with torch.no_grad():
        assert not head(hidden, classes).requires_grad
    head.step(1.0)
    assert torch.equal(head.dense(), before) and head.grad_norm() == 0
    for to_none in (True, False):
        head(hidden, classes).backward()
        head.zero_grad(set_to_none=to_none)
        head.step(1.0)
        assert torch.equal(head.dense(), before)
    head.requires_grad_(False)
    head(hidden, classes).backward()
    head.step(1.0)
    assert torch.equal(head.dense(), before)
    assert not head(hidden.detach(), classes).requires_grad


def test_a_pass_for_hidden_alone_does_not_count_in_the_next():
    head = make()
    hidden, classes = batch(8)
    head(hidden, classes).backward()
    norm = head.grad_norm().clone()
    head.zero_grad()
    torch.autograd.grad(head(hidden, classes), hidden)
    head(hidden, classes).backward()
    assert head.grad_norm() == norm


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    heads = [make(), make()]
    heads[1].load_state_dict(heads[0].state_dict())
    (first, classes), (second, others) = batch(8), batch(5)
    (heads[0](first, classes) + heads[0](second, others)).backward()
    losses = [checkpoint(heads[1], *each, use_reentrant=reentrant) for each in ((first, classes), (second, others))]
    sum(losses).backward()
    assert relative_error(heads[1].grad_norm(), heads[0].grad_norm()) < 1e-12
    for head in heads:
        head.step(2.0)
    assert relative_error(heads[1].dense(), heads[0].dense()) < 1e-12


def test_twice_through_one_graph():
    head = make()
    hidden, classes = batch(8)
    loss = head(hidden, classes)
    loss.backward(retain_graph=True)
    norm = head.grad_norm().clone()
    loss.backward()
    assert relative_error(head.grad_norm(), 2 * norm) < 1e-12


@members
def test_gradcheck(name, options, definition):
    head = make(name, options, classes=9, size=4)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 4], [8, -100], [3, 3]])
    torch.autograd.gradcheck(lambda hidden: head(hidden, labels, reduction="none"), (hidden,))


def test_the_gradient_after_zero_grad_is_the_new_one_alone():
    head = make()
    first, second = batch(4), batch(6)
    head(*first).backward()
    head.zero_grad()
    head(*second).backward()
    norm = head.grad_norm()
    head.zero_grad()
    head(*second).backward()
    assert head.grad_norm() == norm


def test_clipping_by_the_global_norm_is_torchs():
    head = make("mse")
    body = nn.Linear(5, SIZE, dtype=torch.float64)
    plain_body = copy.deepcopy(body)
    dense = Dense(head, MEMBERS[0][2], {}, lr=1e-3)
    features, classes = torch.randn(8, 5, dtype=torch.float64), batch(8)[1]
    head(body(features), classes).backward()
    dense.rows(plain_body(features), classes).mean().backward()
    norms = [
        nn.utils.clip_grad_norm_(parameters, 0.5)
        for parameters in ([*body.parameters(), *head.parameters()], [*plain_body.parameters(), dense.weight])
    ]
    assert relative_error(*norms) < 1e-12
    assert relative_error(head.grad_norm(), dense.weight.grad.norm()) < 1e-6
    head.scale_gradient(0.25)
    dense.weight.grad.mul_(0.25)
    head.step(1e-2)
    dense.optimizer.param_groups[0]["lr"] = 1e-2
    dense.step()
    assert relative_error(head.dense(), dense.weight) < 1e-12


def test_clipped_micro_batches_stay_clipped():
    head = make("mse")
    dense = Dense(head, MEMBERS[0][2], {}, lr=1e-3)
    first, second = batch(4), batch(6)
    for part, factor in ((first, 0.5), (second, 1.0)):
        head(*part).backward()
        dense.rows(*part).mean().backward()
        head.scale_gradient(factor)
        dense.weight.grad.mul_(factor)
    head.step(1e-3)
    dense.step()
    assert relative_error(head.dense(), dense.weight) < 1e-12
