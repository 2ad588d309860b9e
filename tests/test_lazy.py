"""Lazy logits against the real ones: every recorded operation, every answer, and what is not understood."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from tests.pair import CLASSES, ROWS, WIDTH, Pair, loss_of
from xhead.lazy import LazyLogits
from xhead.standin import MaterializedWarning


def assert_same_loss(pair, lazy, dense, **options):
    assert isinstance(lazy, LazyLogits)
    assert lazy.shape == dense.shape
    assert lazy.dtype == dense.dtype
    actual, expected = loss_of(lazy, **options), loss_of(dense, **options)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(pair.gradients(actual.sum()), pair.gradients(expected.sum()))
    record = lazy._record
    assert (record.cut, record.materialized) == (1, 0)
    torch.testing.assert_close(lazy.materialize(), dense)


STEPS = {
    "none": lambda o, p: o,
    "mul": lambda o, p: o * 0.3,
    "rmul": lambda o, p: 0.3 * o,
    "div": lambda o, p: o / 3,
    "neg": lambda o, p: -o,
    "softcap": lambda o, p: torch.tanh(o / 2.0) * 2.0,
    "softcap method": lambda o, p: (o / 2.0).tanh() * 2.0,
    "softcap functional": lambda o, p: F.tanh(o / 2.0) * 2.0,
    "scale, then softcap": lambda o, p: 30 * torch.tanh(o * 0.5 / 30),
    "negative softcap": lambda o, p: -3.0 * torch.tanh(o / 2.0),
    "uneven softcap": lambda o, p: torch.tanh(o / 3.0) * 5.0 / 2.0,
    "add vector": lambda o, p: o + p.vector,
    "radd vector": lambda o, p: p.vector + o,
    "add row vector": lambda o, p: o + p.vector[None, None],
    "sub vector": lambda o, p: o - p.vector,
    "rsub vector": lambda o, p: p.vector - o,
    "scale, then vector": lambda o, p: o * 0.5 + p.vector,
    "vector, then scale": lambda o, p: (o + p.vector) * 0.5,
    "vector, then softcap": lambda o, p: 4 * torch.tanh((o + p.vector) / 4),
    "add number": lambda o, p: o + 1.5,
    "mul by a scalar tensor": lambda o, p: o * p.number,
    "mul by a tensor of one": lambda o, p: o * p.number.reshape(1, 1),
    "div by a scalar tensor": lambda o, p: o / p.number.exp(),
    "torch.mul": lambda o, p: torch.mul(o, 2.0),
    "torch.div": lambda o, p: torch.div(o, 2.0),
    "torch.add": lambda o, p: torch.add(o, p.vector),
    "float": lambda o, p: o.float().double(),
    "to": lambda o, p: o.to(torch.float64).to("cpu").type_as(p.vector).type(torch.float64),
    "contiguous": lambda o, p: o.contiguous().clone(),
    "view": lambda o, p: o.view(-1, CLASSES),
    "view last": lambda o, p: o.view(10, -1),
    "view tuple": lambda o, p: o.view((5, 2, CLASSES)),
    "reshape": lambda o, p: o.reshape(-1, o.shape[-1]),
    "reshape size": lambda o, p: o.reshape(o.size()),
    "flatten": lambda o, p: o.flatten(0, 1),
    "torch.flatten": lambda o, p: torch.flatten(o, 0, -2),
    "shift": lambda o, p: o[:, :-1],
    "shift ellipsis": lambda o, p: o[..., :-1, :],
    "shift contiguous": lambda o, p: o[..., 1:, :].contiguous(),
    "steps of rows": lambda o, p: o[:, ::2, :],
    "row": lambda o, p: o[0],
    "rows by index": lambda o, p: o[:, torch.tensor([0, 2, 4])],
    "rows by list": lambda o, p: o[:, [0, 2, 4]],
    "rows by mask": lambda o, p: o[torch.tensor([[True, False, True, True, False], [True] * 5])],
    "new axis": lambda o, p: o[None],
    "columns": lambda o, p: o[..., :8],
    "columns of columns": lambda o, p: o[..., 2:][..., 1:7],
    "columns after a vector": lambda o, p: (o + p.vector)[:, :, 3:-1],
    "vector after columns": lambda o, p: o[..., 3:] + p.vector[3:],
    "unsqueeze": lambda o, p: o.unsqueeze(0).squeeze(0),
    "unsqueeze inside": lambda o, p: o.unsqueeze(-2),
    "squeeze last": lambda o, p: o.squeeze(-1),
    "transpose rows": lambda o, p: o.transpose(0, 1),
    "narrow": lambda o, p: o.narrow(1, 1, 3),
}


@pytest.mark.parametrize("name", STEPS)
def test_recorded_steps(name):
    pair = Pair()
    assert_same_loss(pair, STEPS[name](pair.lazy, pair), STEPS[name](pair.dense, pair))


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"scale": 0.25}, {"softcap": 3.0, "scale": -2.0}])
@pytest.mark.parametrize("bias", [True, False])
def test_constructor(options, bias):
    pair = Pair(bias=bias, **options)
    assert pair.lazy.scale == pytest.approx(options.get("scale", 1.0))
    assert pair.lazy.softcap == options.get("softcap")
    assert_same_loss(pair, pair.lazy, pair.dense)


def test_scale_of_softcap_is_exact():
    lazy = Pair(bias=False).lazy
    for cap in (30.0, 49.0, 0.1):
        capped = torch.tanh(lazy / cap) * cap
        assert (capped.scale, capped.softcap) == (1.0, cap)


REPLAYED = {
    "vector after tanh": lambda o, p: torch.tanh(o) + p.vector,
    "two caps": lambda o, p: torch.tanh(torch.tanh(o) * 2),
    "per-class factors": lambda o, p: o * p.vector,
    "clamp": lambda o, p: o.clamp(-1.0, 1.0),
    "sigmoid": lambda o, p: torch.sigmoid(o) * 3,
    "relu": lambda o, p: F.relu(o + p.vector),
    "number times zero": lambda o, p: o * 0.0 + p.vector,
    "scalar after tanh": lambda o, p: torch.tanh(o) * p.number,
}


@pytest.mark.parametrize("name", REPLAYED)
def test_other_steps_are_replayed(name, monkeypatch):
    monkeypatch.setattr("xhead.replay.BLOCK_BYTES", 3 * 4 * CLASSES)  # three rows at a time
    pair = Pair()
    lazy = REPLAYED[name](pair.lazy, pair)
    with pytest.warns(MaterializedWarning, match="replayed row block by row block"):
        assert_same_loss(pair, lazy, REPLAYED[name](pair.dense, pair))
    with pytest.raises(RuntimeError, match="ask for .statistics"):
        _ = lazy.scale


def test_replay_needs_memory_for_a_block_only(monkeypatch):
    monkeypatch.setattr("xhead.replay.BLOCK_BYTES", 8 * 4 * 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor) and value.shape[-1:] == (1000,):
                    largest = max(largest, value.numel())
            return out

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    lazy = LazyLogits(hidden, weight).clamp(-1, 1)
    with Watch(), pytest.warns(MaterializedWarning):
        F.cross_entropy(lazy, torch.arange(64)).backward()
    assert 0 < largest <= 8 * 1000


MATERIALIZED = {
    "softmax": lambda o, p: o.softmax(-1),
    "F.softmax": lambda o, p: F.softmax(o, dim=-1),
    "matmul": lambda o, p: o @ torch.ones(CLASSES, 2, dtype=torch.float64),
    "comparison": lambda o, p: o > 0,
    "equality": lambda o, p: o == 0,
    "where": lambda o, p: torch.where(p.dense > 0, o, 0.0),
    "cat": lambda o, p: torch.cat([p.dense, o]),
    "stack of lists": lambda o, p: torch.stack((o, o)),
    "row factors": lambda o, p: o * torch.arange(2.0)[:, None, None],
    "full-size sum": lambda o, p: o + torch.ones(*ROWS, CLASSES),
    "tensor minus": lambda o, p: p.dense - o,
    "power": lambda o, p: o**2,
    "reciprocal": lambda o, p: 1 / o,
    "one class": lambda o, p: o[..., 3],
    "every other class": lambda o, p: o[..., ::2],
    "classes by index": lambda o, p: o[..., torch.tensor([1, 2])],
    "axis behind": lambda o, p: o[..., None],
    "flat": lambda o, p: o.view(-1),
    "other last dimension": lambda o, p: o.reshape(CLASSES, -1),
    "transpose": lambda o, p: o.transpose(1, 2),
    "mT": lambda o, p: o.mT,
    "gather two": lambda o, p: o.gather(-1, torch.zeros(*ROWS, 2, dtype=torch.long)),
    "log_softmax elsewhere": lambda o, p: F.log_softmax(o, dim=0),
    "max": lambda o, p: o.max(-1).values,
    "alpha": lambda o, p: torch.add(o, p.dense, alpha=2),
    "out": lambda o, p: torch.tanh(o.detach(), out=torch.empty(*ROWS, CLASSES, dtype=torch.float64)),
    "integers": lambda o, p: o.detach().long(),
    "list": lambda o, p: torch.tensor(o.tolist(), dtype=torch.float64),
    "numpy": lambda o, p: torch.from_numpy(o.detach().numpy()),
    "soft targets": lambda o, p: F.cross_entropy(o.view(-1, CLASSES), torch.full((10, CLASSES), 1 / CLASSES).double()),
    "classes in the middle": lambda o, p: F.cross_entropy(o.transpose(1, 2), torch.zeros(ROWS, dtype=torch.long)),
}


@pytest.mark.parametrize("name", MATERIALIZED)
def test_what_is_not_understood_builds_the_logits(name):
    pair = Pair()
    with pytest.warns(MaterializedWarning, match="were built") as caught:
        actual = MATERIALIZED[name](pair.lazy, pair)
    assert len(caught) == 1
    expected = MATERIALIZED[name](pair.dense, pair)
    torch.testing.assert_close(actual, expected)
    if expected.requires_grad:
        torch.testing.assert_close(pair.gradients(actual.sum()), pair.gradients(expected.sum()))
    assert pair.lazy._record.materialized == 1


def test_log_probabilities_that_are_not_understood():
    pair = Pair()
    with pytest.warns(MaterializedWarning, match="`exp` needs the logits themselves"):
        probabilities = F.log_softmax(pair.lazy, -1).exp()
    torch.testing.assert_close(probabilities, pair.dense.softmax(-1))


def test_materialized_once():
    pair = Pair()
    with pytest.warns(MaterializedWarning):
        first = pair.lazy.softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(pair.lazy.softmax(-1), first)
        assert isinstance(pair.lazy * 2, torch.Tensor)
        torch.testing.assert_close(loss_of(pair.lazy), loss_of(pair.dense))
    assert pair.lazy._record.materialized == 1
    assert pair.lazy._record.operations == {"softmax": 1}


def test_looked_at_without_gradients_first():
    pair = Pair()
    index = torch.zeros(*ROWS, 1, dtype=torch.long)
    log_p, dense_log_p = F.log_softmax(pair.lazy, -1), F.log_softmax(pair.dense, -1)
    with torch.no_grad():
        assert not log_p.gather(-1, index).requires_grad
    for take in (lambda o: o.gather(-1, index).sum(), lambda o: o.sum(-1).square().sum()):
        torch.testing.assert_close(pair.gradients(take(log_p)), pair.gradients(take(dense_log_p)))
    with torch.no_grad(), pytest.warns(MaterializedWarning):
        assert not any(value.requires_grad for value in (log_p.exp(), pair.lazy.softmax(-1)))
    for lazy, dense in ((loss_of(pair.lazy), loss_of(pair.dense)), (log_p.max(), dense_log_p.max())):
        torch.testing.assert_close(pair.gradients(lazy), pair.gradients(dense))


IN_PLACE = {
    "setitem": lambda o: o.__setitem__((..., 3), -1e4),
    "masked_fill_": lambda o: o.masked_fill_(torch.arange(CLASSES) > 5, -1e4),
    "mul_": lambda o: o.mul_(3.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_writes_are_seen_afterwards(name):
    pair = Pair()
    lazy, dense = pair.lazy * 1.0, pair.dense * 1.0
    with pytest.warns(MaterializedWarning):
        IN_PLACE[name](lazy)
    IN_PLACE[name](dense)
    torch.testing.assert_close(loss_of(lazy), loss_of(dense))
    torch.testing.assert_close(pair.gradients(loss_of(lazy)), pair.gradients(loss_of(dense)))


def test_augmented_assignment():
    pair = Pair()
    lazy, dense = pair.lazy, pair.dense.clone()
    same = lazy
    for logits in (lazy, dense):
        logits /= 3.0
        logits *= 2.0
        logits += pair.vector
        logits -= 1.0
    assert_same_loss(pair, same, dense)


def test_questions_without_values():
    lazy = Pair(dtype=torch.float32).lazy
    assert lazy.shape == lazy.size() == torch.Size((*ROWS, CLASSES))
    assert lazy.size(-1) == CLASSES
    assert lazy.ndim == lazy.dim() == 3
    assert lazy.numel() == torch.numel(lazy) == 110
    assert lazy.is_floating_point() is torch.is_floating_point(lazy) is True
    assert not lazy.is_complex()
    assert (lazy.dtype, lazy.device, lazy.layout) == (torch.float32, torch.device("cpu"), torch.strided)
    assert (lazy.itemsize, lazy.nbytes, lazy.element_size()) == (4, 440, 4)
    assert lazy.requires_grad
    assert not lazy.detach().requires_grad
    assert lazy.grad is None
    assert len(lazy) == 2
    assert [row.shape for row in lazy] == [(5, CLASSES)] * 2
    assert repr(lazy) == "LazyLogits(shape=(2, 5, 11), dtype=torch.float32, device='cpu')"
    assert lazy.is_contiguous()
    assert not lazy.is_cuda
    assert hash(lazy) == hash(lazy)
    assert not hasattr(lazy, "keys")
    assert lazy._record.materialized == 0


def test_sum_of_two_projections_is_one():
    hidden, low = torch.randn(6, WIDTH, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    weight, up = torch.randn(CLASSES, WIDTH, requires_grad=True), torch.randn(CLASSES, 2, requires_grad=True)
    bias = torch.randn(CLASSES, requires_grad=True)
    leaves = (hidden, low, weight, up, bias)
    lazy = LazyLogits(hidden, weight, bias) + LazyLogits(low, up) * 0.5
    dense = F.linear(hidden, weight, bias) + F.linear(low, up) * 0.5
    for change in (lambda o: o, lambda o: torch.tanh(o / 3) * 3, lambda o: o[2:, :7]):
        actual, expected = loss_of(change(lazy)), loss_of(change(dense))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, leaves, retain_graph=True),
            torch.autograd.grad(expected, leaves, retain_graph=True),
            rtol=1e-5,
            atol=1e-6,
        )
    assert lazy._record.materialized == 0
    torch.testing.assert_close(lazy.materialize(), dense)


def test_sum_of_capped_logits_is_built():
    pair, other = Pair(), Pair()
    with pytest.warns(MaterializedWarning):
        total = torch.tanh(pair.lazy) + other.lazy
    torch.testing.assert_close(total, torch.tanh(pair.dense) + other.dense)


def test_copy_and_pickle():
    lazy = LazyLogits(torch.randn(3, WIDTH), torch.randn(CLASSES, WIDTH)) * 2.0
    for other in (copy.copy(lazy), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        torch.testing.assert_close(other.materialize(), lazy.materialize())


def test_misuse():
    hidden, weight = torch.randn(4, WIDTH), torch.randn(CLASSES, WIDTH)
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor, got list"):
        LazyLogits([1.0], weight)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"hidden must be \(\.\.\., D\).*\(4, 7\) and \(7, 11\)"):
        LazyLogits(hidden, weight.T)
    with pytest.raises(RuntimeError, match=r"bias must have shape \(11,\), got \(7,\)"):
        LazyLogits(hidden, weight, torch.zeros(WIDTH))
    with pytest.raises(ValueError, match="softcap must be a positive number or None, got -1"):
        LazyLogits(hidden, weight, softcap=-1)
    with pytest.raises(TypeError, match="scale must be a number"):
        LazyLogits(hidden, weight, scale=torch.ones(()))  # type: ignore[arg-type]
    lazy = LazyLogits(hidden, weight)
    with pytest.raises(ValueError, match=r"target must have shape \(4,\), one class a row of the logits, got \(3,\)"):
        F.cross_entropy(lazy, torch.zeros(3, dtype=torch.long))
    with pytest.raises(IndexError, match="target 11 is out of bounds"):
        F.cross_entropy(lazy, torch.tensor([0, 11, 1, 2]))
    with pytest.raises(IndexError, match="target -1 is out of bounds"):
        F.cross_entropy(lazy, torch.tensor([0, -1, 1, 2]))
    with pytest.raises(RuntimeError, match=r"expected target dtype to be Long or Byte, but got torch\.int32"):
        F.cross_entropy(lazy, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got \'max\''):
        F.cross_entropy(lazy, torch.zeros(4, dtype=torch.long), reduction="max")
    with pytest.raises(RuntimeError, match="same floating dtype"):
        F.cross_entropy(LazyLogits(hidden.double(), weight), torch.zeros(4, dtype=torch.long))
    with pytest.raises(AttributeError, match="no attribute 'logit'|has no attribute 'wrong'"):
        _ = lazy.wrong
