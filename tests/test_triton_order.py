"""The order in which the Triton engine puts the classes into tiles, and blocks that the copy engine loads."""

import pytest
import torch

from tests.dense import relative_error
from tests.test_triton import DEVICE, SLACK, doubled, gradients, like_a_language, make, rows_of, watch_shares
from xhead.engines import class_order
from xhead.engines import operands as engine_operands
from xhead.engines import triton as engine
from xhead.statistics import row_statistics

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def filter_always(monkeypatch):
    """The filter at work however many tiles are active, and nothing learned before."""
    monkeypatch.setattr(engine, "DENSE_SHARE", 1.0)
    class_order.clear()
    yield
    class_order.clear()


def shuffled(monkeypatch, classes):
    order = torch.randperm(classes, device=DEVICE).int()
    monkeypatch.setattr(class_order, "current", lambda *_: order)
    monkeypatch.setattr(class_order, "learn", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "bias"), [(None, True), (15.0, False)])
def test_any_order_is_exact_where_all_is_kept(dtype, softcap, bias, monkeypatch):
    inputs = make(dtype=dtype, bias=bias)
    shuffled(monkeypatch, inputs[1].shape[0])
    mine = gradients(inputs, filter_eps=1e-37, softcap=softcap)
    true = gradients(doubled(inputs), engine="reference", filter_eps=None, softcap=softcap)
    stock = gradients(inputs, engine="reference", filter_eps=None, softcap=softcap)
    for one, exact, same_dtype in zip(mine, true, stock, strict=True):
        assert relative_error(one, exact) <= relative_error(same_dtype, exact) + SLACK[dtype]


@pytest.mark.parametrize("eps", [2**-4, 2**-6])
def test_an_order_is_that_of_the_classes_renumbered(eps, monkeypatch):
    """Tiles hold the same classes whether the weight's rows were moved or an order names them, so all sums agree."""
    hidden, weight, _, target = like_a_language()
    order = torch.randperm(weight.shape[0], device=DEVICE)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=DEVICE))
    bias = torch.randn(weight.shape[0], device=DEVICE, requires_grad=True)
    monkeypatch.setattr(class_order, "learn", lambda *_: None)
    moved = [t.detach().requires_grad_() for t in (hidden, weight[order], bias[order])]
    wanted = gradients((*moved, place[target]), filter_eps=eps)
    monkeypatch.setattr(class_order, "current", lambda *_: order.int())
    found = gradients((hidden, weight, bias, target), filter_eps=eps)
    assert relative_error(found[0], wanted[0]) < 1e-6
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert relative_error(one[order], other) < 1e-6


def test_a_bias_alone_trains(monkeypatch):
    hidden, weight, bias, target = make(rows=70, bias=True)
    shuffled(monkeypatch, weight.shape[0])
    frozen = (hidden.detach(), weight.detach())
    alone = torch.autograd.grad(rows_of(*frozen, bias, target, filter_eps=2**-7).mean(), bias)[0]
    assert relative_error(alone, gradients((hidden, weight, bias, target), filter_eps=2**-7)[2]) < 1e-5


def test_the_largest_logit_is_named_by_its_class(monkeypatch):
    hidden, weight, *_ = make()
    shuffled(monkeypatch, weight.shape[0])
    found = row_statistics(hidden, weight, ("lse", "argmax"), engine="triton", filter_eps=2**-6)
    assert torch.equal(found.argmax, (hidden @ weight.T).argmax(1))


def test_calls_learn_an_order_that_needs_fewer_tiles(monkeypatch):
    """A few classes that are often likely, among many that never are, numbered at random."""
    hidden, weight, _, target = like_a_language()
    order = torch.randperm(weight.shape[0], device=DEVICE)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=DEVICE))
    weight, target = weight.detach()[order].requires_grad_(), place[target]
    shares = watch_shares(monkeypatch)
    for half in (slice(0, None, 2), slice(1, None, 2), slice(1, None, 2)):
        gradients((hidden[half].detach().requires_grad_(), weight, None, target[half]), filter_eps=2**-5)
    numbered, learned, again = shares
    assert learned < 0.7 * numbered
    assert again <= learned


def test_the_same_calls_give_the_same_bits():
    inputs = like_a_language(torch.bfloat16)

    def calls():
        class_order.clear()
        return [gradients(inputs, filter_eps=2**-8) for _ in range(2)]

    for one, other in zip(calls(), calls(), strict=True):
        assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_looks_grow_rare(monkeypatch):
    looks = []
    peaks = class_order._peaks
    monkeypatch.setattr(class_order, "_peaks", lambda *arguments: (looks.append(len(made)), peaks(*arguments))[1])
    hidden, weight, _, target = make(rows=3, classes=20, size=4)
    made = []
    monkeypatch.setattr(class_order, "EVERY", 8)
    while len(made) < 30:
        made.append(rows_of(hidden, weight, None, target, filter_eps=2**-6))
    assert looks == [0, 1, 3, 7, 15, 23]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_nan_teaches_nothing():
    hidden, weight, _, target = make(rows=70)
    with torch.no_grad():
        hidden[3, 5] = float("nan")
    rows_of(hidden, weight, None, target, filter_eps=2**-6)
    order = class_order.current(weight.shape[0], weight.device)
    assert torch.equal(order.sort().values, torch.arange(weight.shape[0], device=DEVICE).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "described"), [(72, True), (75, False)], ids=["aligned", "unaligned"])
def test_blocks_loaded_by_descriptors(dtype, size, described, monkeypatch):
    """Odd sizes are filled with zeros; what the copy engine cannot load is not given to it."""
    launched = []
    module = engine_operands.kernels("row_statistics")
    descriptor = module.descriptor
    monkeypatch.setattr(module, "descriptor", lambda *arguments: (launched.append(1), descriptor(*arguments))[1])
    hidden, weight, bias, _ = make(size=size, dtype=dtype, bias=True)
    original = engine_operands.blocks_for
    monkeypatch.setattr(
        engine_operands, "blocks_for", lambda problem: original(problem)._replace(described=True, specialised=True)
    )
    with torch.no_grad():
        found = row_statistics(
            hidden, weight, ("lse", "max", "argmax"), bias=bias, softcap=20.0, engine="triton", scale=0.5
        )
    logits = 20.0 * torch.tanh(0.5 * torch.nn.functional.linear(hidden.double(), weight.double(), bias.double()) / 20.0)
    assert bool(launched) == described
    assert relative_error(found.lse, logits.logsumexp(1)) < 1e-5
    assert relative_error(found.max, logits.amax(1)) < 1e-5
    assert logits.gather(1, found.argmax[:, None])[:, 0].sub(logits.amax(1)).abs().max() < 1e-4
