"""Accumulation in two processes: the mean gradient, at an exchange of D x D numbers in place of V x D."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import xhead
from tests.dense import relative_error
from tests.processes import in_processes
from tests.tiny import tokens, twins
from xhead.exchange import Exchange
from xhead.losses import get_loss

RANKS, CLASSES, SIZE = 2, 400, 6


def _rows(linear, hidden, labels):
    return get_loss("zloss", a=0.5, b=3.0, engine="gram")(xhead.LazyLogits(hidden, linear.weight), labels)


def _batches(rank):
    """Two micro-batches of one process, of other sizes than the other's."""
    generator = torch.Generator().manual_seed(rank)
    counts = (5 + rank, 3 + rank)
    labels = [torch.randint(CLASSES, (count,), generator=generator) for count in counts]
    return [(torch.randn(len(each), SIZE, generator=generator).double(), each) for each in labels]


def _linear(classes=CLASSES):
    torch.manual_seed(0)
    return nn.Linear(SIZE, classes, bias=False, dtype=torch.float64)


def _check_gradient(rank):
    linear, plain = _linear(), _linear()
    for each in range(RANKS):
        for hidden, labels in _batches(each):
            (_rows(plain, hidden, labels).mean() / RANKS).backward()
    with xhead.accumulate(linear.weight, process_group=dist.group.WORLD):
        for hidden, labels in _batches(rank):
            _rows(linear, hidden, labels).mean().backward()
    assert relative_error(linear.weight.grad, plain.weight.grad) < 1e-12


def _check_exchange(monkeypatch):
    sent = []
    for name in ("gather", "add_up"):
        method = getattr(Exchange, name)

        def counting(self, tensor, *given, method=method):
            sent.append(tensor.numel())
            return method(self, tensor, *given)

        monkeypatch.setattr(Exchange, name, counting)
    totals = []
    for classes in (CLASSES, 10 * CLASSES):
        sent.clear()
        linear = _linear(classes)
        with xhead.accumulate(linear.weight, process_group=dist.group.WORLD):
            hidden = torch.randn(4, SIZE, dtype=torch.float64)
            _rows(linear, hidden, torch.arange(4)).mean().backward()
        totals.append(sum(sent))
    assert totals[0] == totals[1] == (SIZE + 1) * SIZE + SIZE + 4 * (SIZE + 1)


def _check_errors(rank):
    linear, group = _linear(), dist.group.WORLD
    labels = torch.tensor([1, 2, 3])
    hidden = torch.randn(3, SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match="one of 2 processes.*give process_group="), xhead.accumulate(linear.weight):
        pass
    with pytest.raises(IndexError, match="400 is out of bounds"), xhead.accumulate(linear.weight, process_group=group):
        _rows(linear, hidden, labels + 397 * rank).mean().backward()
    where = "" if rank else "on rank 1: "
    with (
        pytest.raises(RuntimeError, match=where + "no gradient was collected in this process"),
        xhead.accumulate(linear.weight, process_group=group),
    ):
        _rows(linear, hidden, labels).mean().backward() if rank == 0 else None
    linear.weight.grad = torch.ones_like(linear.weight)
    with (
        pytest.raises(RuntimeError, match="a gradient from elsewhere, which would not be reduced"),
        xhead.accumulate(linear.weight, process_group=group),
    ):
        _rows(linear, hidden, labels).mean().backward()
    assert torch.equal(linear.weight.grad, torch.ones_like(linear.weight))


def _check_data_parallel(rank):
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    for each in (plain, model):
        xhead.patch(each, loss="zloss")
    for seed in range(2 * RANKS):
        (plain(**tokens(seed=seed)).loss / RANKS).backward()
    with (
        pytest.raises(ValueError, match=r"reduces lm_head.weight.*_to_ignore = \['lm_head.weight'\]"),
        xhead.accumulate(DistributedDataParallel(model), process_group=dist.group.WORLD),
    ):
        pass
    model._ddp_params_and_buffers_to_ignore = ["lm_head.weight"]
    parallel = DistributedDataParallel(model)
    with xhead.accumulate(parallel, process_group=dist.group.WORLD):
        with parallel.no_sync():
            parallel(**tokens(seed=rank)).loss.backward()
        parallel(**tokens(seed=RANKS + rank)).loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=lambda text, name=name: f"{name} {text}")


def _check(rank):
    _check_gradient(rank)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _check_exchange(monkeypatch)
    _check_errors(rank)
    _check_data_parallel(rank)


def test_two_processes(tmp_path):
    in_processes(_check, RANKS, tmp_path)
