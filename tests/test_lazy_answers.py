"""What lazy logits answer without being built, against the real ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.pair import CLASSES, ROWS, WIDTH, Pair, loss_of
from tests.test_lazy import REPLAYED, STEPS
from xhead.lazy import LazyLogits
from xhead.losses import get_loss
from xhead.standin import Record


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy(reduction, weighted, label_smoothing, ignore_index, masked, monkeypatch):
    if masked:
        # In a graph, and on a GPU, ignored rows are masked: finding them would wait for the device.
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pair = Pair()
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    options["weight"] = torch.rand(CLASSES, dtype=torch.float64) + 0.1 if weighted else None
    target = torch.tensor([0, 3, 10, 5, 3, 1, 2, 9, 8, 7])
    actual = F.cross_entropy(pair.lazy.view(-1, CLASSES), target, **options)
    module = nn.CrossEntropyLoss(**options)(pair.lazy.view(-1, CLASSES), target)
    expected = F.cross_entropy(pair.dense.view(-1, CLASSES), target, **options)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(module, expected)
    torch.testing.assert_close(pair.gradients(actual.sum()), pair.gradients(expected.sum()))
    assert pair.lazy._record.materialized == 0


def test_cross_entropy_of_one_row():
    pair = Pair()
    for reduction in ("mean", "none"):
        actual = F.cross_entropy(pair.lazy[0, 0], torch.tensor(4), reduction=reduction)
        torch.testing.assert_close(actual, F.cross_entropy(pair.dense[0, 0], torch.tensor(4), reduction=reduction))


def test_all_rows_ignored():
    pair = Pair()
    target = torch.full((10,), -100)
    assert F.cross_entropy(pair.lazy.view(-1, CLASSES), target).isnan()
    total = F.cross_entropy(pair.lazy.view(-1, CLASSES), target, reduction="sum")
    assert total == 0
    for gradient in pair.gradients(total)[:3]:
        assert gradient is not None
        assert not gradient.any()


def test_ignored_rows_leave_before_the_projection():
    seen = []

    class Spy:
        out_features = CLASSES

        def consume(self, hidden, function):
            seen.append(hidden.shape)
            return function(hidden, weight, None)

        def trains(self):
            return True

    weight = torch.randn(CLASSES, WIDTH, requires_grad=True)
    lazy = LazyLogits.deferred(torch.randn(6, WIDTH), Spy(), Record())
    F.cross_entropy(lazy, torch.tensor([1, -100, -100, 2, -100, 3]))
    assert seen == [(3, WIDTH)]


def test_log_softmax_as_label_smoothing_asks_it():
    pair = Pair()
    index = torch.randint(0, CLASSES, (*ROWS, 1))
    for lazy, dense in (
        (-F.log_softmax(pair.lazy, dim=-1), -F.log_softmax(pair.dense, dim=-1)),
        (pair.lazy.log_softmax(-1), pair.dense.log_softmax(-1)),
        (torch.log_softmax(pair.lazy, -1, torch.float64), pair.dense.log_softmax(-1)),
    ):
        assert (lazy.shape, lazy.dtype, lazy.dim()) == (dense.shape, dense.dtype, 3)
        picked, total = lazy.gather(dim=-1, index=index), lazy.sum(dim=-1, keepdim=True, dtype=torch.float32)
        torch.testing.assert_close(picked, dense.gather(-1, index))
        torch.testing.assert_close(total, dense.sum(-1, keepdim=True, dtype=torch.float32))
        value, expected = picked.sum() + total.double().sum(), dense.gather(-1, index).sum() + dense.sum()
        torch.testing.assert_close(pair.gradients(value), pair.gradients(expected), rtol=1e-5, atol=1e-5)
    assert pair.lazy._record.materialized == 0


def test_other_answers():
    pair = Pair()
    index = torch.randint(0, CLASSES, (*ROWS, 1))
    pairs = {
        "logsumexp": (torch.logsumexp(pair.lazy, -1), torch.logsumexp(pair.dense, -1)),
        "logsumexp method": (pair.lazy.logsumexp(-1, keepdim=True), pair.dense.logsumexp(-1, keepdim=True)),
        "gather": (torch.gather(pair.lazy, -1, index), torch.gather(pair.dense, -1, index)),
        "gather method": (pair.lazy.gather(-1, index), pair.dense.gather(-1, index)),
        "argmax": (pair.lazy.argmax(-1), pair.dense.argmax(-1)),
        "torch.argmax": (torch.argmax(pair.lazy, dim=-1, keepdim=True), pair.dense.argmax(-1, keepdim=True)),
    }
    for actual, expected in pairs.values():
        torch.testing.assert_close(actual, expected)
    assert pair.lazy._record.materialized == 0


def test_statistics():
    pair = Pair(softcap=2.0, scale=0.5)
    target = torch.randint(0, CLASSES, ROWS)
    found = pair.lazy.statistics("lse", "target", "mean", "entropy", "argmax", target=target)
    torch.testing.assert_close(found.lse, pair.dense.logsumexp(-1))
    torch.testing.assert_close(found.target, pair.dense.gather(-1, target[..., None])[..., 0])
    torch.testing.assert_close(found.mean, pair.dense.mean(-1))
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(logits=pair.dense).entropy())
    torch.testing.assert_close(found.argmax, pair.dense.argmax(-1))
    assert found.variance is None
    with pytest.raises(ValueError, match="unknown statistic 'median'"):
        pair.lazy.statistics("median")


def test_detached_logits_have_no_gradient():
    pair = Pair()
    loss = F.cross_entropy(pair.lazy.detach().view(-1, CLASSES), torch.zeros(10, dtype=torch.long))
    assert not loss.requires_grad


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(cast):
    hidden, weight = torch.randn(6, WIDTH, requires_grad=True), torch.randn(CLASSES, WIDTH, requires_grad=True)
    target = torch.arange(6)
    with torch.autocast("cpu", cast):
        lazy, dense = LazyLogits(hidden, weight), F.linear(hidden, weight)
        assert lazy.dtype == dense.dtype == cast
        actual, expected = F.cross_entropy(lazy, target), F.cross_entropy(dense, target)
        assert actual.dtype == expected.dtype == torch.float32
    # Taken outside autocast, after `.float()`: still the product of what the projection was given in `cast`.
    exact = F.cross_entropy(hidden.to(cast).float() @ weight.to(cast).float().T, target)
    torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(F.cross_entropy(lazy.float(), target), exact, rtol=1e-6, atol=1e-6)
    got, wanted = (torch.autograd.grad(value, (hidden, weight)) for value in (actual, exact))
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=2e-3)
    torch.testing.assert_close(lazy.materialize(), dense)


def test_bfloat16_loss_has_the_dtype_of_the_stock_one():
    hidden, weight = torch.randn(6, WIDTH).bfloat16(), torch.randn(CLASSES, WIDTH).bfloat16()
    lazy = LazyLogits(hidden, weight)
    assert F.cross_entropy(lazy, torch.arange(6)).dtype == torch.bfloat16
    assert F.cross_entropy(lazy.float(), torch.arange(6)).dtype == torch.float32


def test_not_finite_hidden_states_give_nan():
    hidden, weight = torch.randn(3, WIDTH), torch.randn(CLASSES, WIDTH)
    hidden[1, 2] = float("nan")
    assert F.cross_entropy(LazyLogits(hidden, weight), torch.arange(3)).isnan()


def test_double_backward():
    pair = Pair()
    first, expected = (pair.gradients(loss_of(o), create_graph=True)[0] for o in (pair.lazy, pair.dense))
    for a, b in zip(pair.gradients(first.square().sum()), pair.gradients(expected.square().sum()), strict=True):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing():
    pair = Pair()
    found, expected = (pair.gradients(checkpoint(loss_of, o, use_reentrant=False)) for o in (pair.lazy, pair.dense))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", [*STEPS, *REPLAYED])
def test_logits_of_some_classes(name):
    pair = Pair()
    step = STEPS.get(name) or REPLAYED[name]
    lazy, dense = step(pair.lazy, pair), step(pair.dense, pair)
    classes = torch.tensor([4, 1, 4, 2])
    actual, expected = lazy.class_logits(classes), dense[..., classes]
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    ours, stock = (pair.gradients((each * upstream).sum()) for each in (actual, expected))
    # A cast to float32 rounds the stock gradients.
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6 if name == "float" else 1e-9)
    assert pair.lazy._record.materialized == 0
    with pytest.raises(IndexError, match="class 11 is out of bounds"):
        lazy.class_logits(torch.tensor([0, 11]))


def test_logits_of_some_classes_are_single_precision():
    pair = Pair(dtype=torch.bfloat16)
    classes = torch.tensor([4, 1])
    for lazy in (pair.lazy, pair.lazy.float()):
        found = lazy.class_logits(classes)
        assert found.dtype == torch.float32
        exact = F.linear(pair.hidden.double(), pair.weight[classes].double(), pair.bias[classes].double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert not pair.lazy.detach().class_logits(classes).requires_grad


def test_logits_of_some_classes_of_a_sum():
    one, two = Pair(), Pair()
    lazy, dense = one.lazy * 0.5 + two.lazy, one.dense * 0.5 + two.dense
    classes = torch.tensor([9, 0, 3])
    torch.testing.assert_close(lazy.class_logits(classes), dense[..., classes])
    assert one.lazy._record.materialized == 0


SAME_ROWS = {
    "indices": lambda logits: logits[torch.tensor([3, 0, 3])],
    "mask": lambda logits: logits[torch.tensor([True, False, True, True, False, True])],
    "slice": lambda logits: logits[1:5],
    "one": lambda logits: logits[4],
    "new dimension": lambda logits: logits[:, None, 2:9],
    "reshape": lambda logits: logits.reshape(2, 3, logits.shape[-1]),
    "transposed": lambda logits: logits.view(2, 3, -1).transpose(0, 1).flatten(0, 1),
    "squeezed": lambda logits: logits.unsqueeze(0).squeeze(0).narrow(0, 2, 3),
}


@pytest.mark.parametrize("name", SAME_ROWS)
def test_the_mask_of_the_rows_goes_with_them(name):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4)
    mask = torch.tensor([True, False, True, False, True, True])
    logits = LazyLogits(hidden, weight)
    logits._row_mask = mask
    taken = SAME_ROWS[name](logits)
    # Each row of a tensor like the logits says whether it counts.
    expected = SAME_ROWS[name](mask[:, None].expand(6, 11))[..., 0]
    assert torch.equal(taken.row_mask, expected)
    dense = SAME_ROWS[name](hidden @ weight.T).logsumexp(-1)
    torch.testing.assert_close(taken.statistics("lse").lse, torch.where(expected, dense, 0.0))


def test_several_labels_a_row_where_some_rows_do_not_count():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(11, 4)
    labels = torch.tensor([[0, 1], [2, -1], [5, 5]])
    logits = LazyLogits(hidden, weight)
    logits._row_mask = torch.tensor([True, False, True])
    rows = get_loss("sigmoid")(logits, labels)
    exact = F.binary_cross_entropy_with_logits(
        hidden @ weight.T, torch.zeros(3, 11).scatter(1, labels.clamp(min=0), 1.0), reduction="none"
    ).sum(1)
    torch.testing.assert_close(rows[[0, 2]], exact[[0, 2]])
    assert not torch.autograd.grad(rows[1], hidden)[0].any()
