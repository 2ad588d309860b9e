"""The spherical head around its steps: checkpoints, nothing to learn from, precision, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.spherical_case import CLASSES, batch, make
from xhead.heads import SphericalHead
from xhead.losses.spherical_family import spherical_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reload_goes_on_bit_for_bit(dtype, tmp_path):
    head = make(dtype=dtype, stabilise_every=4)
    batches = [batch(8) for _ in range(12)]

    def train(head, batches):
        for hidden, classes in batches:
            head(hidden, classes).backward()
            head.step(5.0, 1e-3)
            head.zero_grad()

    train(head, batches[:6])
    torch.save(head.state_dict(), tmp_path / "head.pt")
    others = [make(dtype=dtype, stabilise_every=4), make(dtype=dtype, stabilise_every=4)]
    others[0].load_state_dict(torch.load(tmp_path / "head.pt"))
    others[1].load_state_dict(torch.load(tmp_path / "head.pt"), assign=True)
    others += [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    for each in (head, *others):
        train(each, batches[6:])
    for other in others:
        for name, value in head.state_dict().items():
            assert torch.equal(value.nan_to_num(), other.state_dict()[name].nan_to_num()), name


def test_a_checkpoint_of_other_sizes_changes_nothing():
    head, other = make(), make(classes=CLASSES + 1)
    hidden, classes = batch(8)
    head(hidden, classes).backward()
    head.step(1.0)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(RuntimeError, match=r"factor is \(998, 17\) in the checkpoint, \(997, 17\) here.*Nothing"):
        head.load_state_dict(other.state_dict())
    for name, value in head.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_nothing_counts():
    head = make()
    before = head.dense()
    hidden, classes = batch(4)
    for labels in (torch.full_like(classes, -100), torch.full((4, 2), -100), classes[:, :0]):
        loss = head(hidden, labels)
        loss.backward()
        assert loss == 0 and not hidden.grad.any() and head.grad_norm() == 0
    empty = head(hidden[:0], classes[:0], reduction="none")
    assert empty.shape == (0,)
    empty.sum().backward()
    head.step(1.0)
    assert torch.equal(head.dense(), before)


def test_half_precision_around_the_head():
    head = make(dtype=torch.float32)
    hidden, classes = batch(8)
    exact = head(hidden.detach(), classes)
    half = hidden.detach().bfloat16().requires_grad_()
    loss = head(half, classes)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert abs(loss - exact) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden.detach(), classes), exact)
        head.step(1.0)
    with pytest.raises(RuntimeError, match=r"must stay float32 or float64, got torch.bfloat16: call head.float\(\)"):
        copy.deepcopy(head).bfloat16()(hidden, classes)


BAD_HEADS = [
    ({"out_features": 16}, "at least as many classes as features, got 16 classes and 17 features"),
    ({"out_features": 17, "bias": True}, "got 17 classes and 18 features"),
    ({"loss": "softmax"}, "unknown spherical loss 'softmax'; known are log_spherical, log_taylor, mse, zloss"),
    ({"loss": "mse", "margin": 1.0}, "unknown option margin for spherical loss 'mse'"),
    ({"loss": spherical_loss("mse"), "margin": 1.0}, "options margin go with a loss named by a string"),
    ({"weight": torch.randn(20, 17)}, r"weight must be \(40, 17\) \(classes, features\), got \(20, 17\)"),
    ({"stabilise_every": 0}, "stabilise_every must be at least 1, got 0"),
    ({"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
    ({"bias": float("nan")}, "bias must be True, False or the finite size"),
]


@pytest.mark.parametrize(("options", "message"), BAD_HEADS, ids=[str(next(iter(each))) for each, _ in BAD_HEADS])
def test_wrong_heads(options, message):
    with pytest.raises(ValueError, match=message):
        SphericalHead(**{"in_features": 17, "out_features": 40, **options})


def test_wrong_types_of_heads():
    with pytest.raises(TypeError, match="must be float32 or float64, got torch.bfloat16"):
        SphericalHead(17, 40, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="loss must be a name or a SphericalLoss"):
        SphericalHead(17, 40, max)
    with pytest.raises(ValueError, match="bias=0.0 does not go with a linear layer with a bias"):
        SphericalHead.from_linear(nn.Linear(17, 40), bias=False)


WRONG_CALLS = [
    ({"labels": torch.tensor([0, 40])}, IndexError, "label 40 is out of bounds: classes are 0 to 39"),
    ({"labels": torch.tensor([[0], [-1]])}, IndexError, "label -1 is out of bounds"),
    ({"labels": torch.tensor([0.0, 1.0])}, RuntimeError, "labels must be integers.*got torch.float32"),
    ({"labels": torch.tensor([0, 1, 2])}, RuntimeError, r"labels must be \(2,\), one class a row, or \(2, 'K'\)"),
    ({"hidden": torch.randn(2, 16)}, RuntimeError, r"hidden must be floating and \(..., 17\)"),
    ({"hidden": torch.ones(2, 17).long()}, RuntimeError, "hidden must be floating"),
    ({"values": torch.randn(3)}, RuntimeError, r"values must be floating numbers of shape \(2,\)"),
    ({"reduction": "average"}, ValueError, "reduction must be one of mean, sum, none, got 'average'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_CALLS)
def test_wrong_calls_change_nothing(wrong, error, message):
    head = SphericalHead(17, 40)
    before = copy.deepcopy(head.state_dict())
    arguments = {"hidden": torch.randn(2, 17), "labels": torch.tensor([0, 1]), **wrong}
    with pytest.raises(error, match=message):
        head(arguments.pop("hidden"), arguments.pop("labels"), **arguments)
    head.step(1.0)
    assert all(torch.equal(value.nan_to_num(), before[k].nan_to_num()) for k, value in head.state_dict().items())


def test_a_loss_of_before_the_step():
    head = make()
    hidden, classes = batch(8)
    first, second = head(hidden, classes), head(hidden, classes)
    first.backward()
    head.step(1.0)
    with pytest.raises(RuntimeError, match="updated or loaded since this loss was computed"):
        second.backward()
    head(hidden, classes).backward()
    head.weight.fold()
    for use in (lambda: head.step(1.0), lambda: head(hidden, classes).backward()):
        with pytest.raises(RuntimeError, match=r"state has changed since its gradient was computed: call zero_grad"):
            use()
