"""`xhead.linear_cross_entropy`: every option against PyTorch's cross-entropy of dense float64 logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import xhead
from tests.dense import dense_logits, relative_error
from xhead.losses import get_loss, register

ROWS, CLASSES, SIZE = 41, 307, 23


def inputs(dtype=torch.float64, lead=(ROWS,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*lead, SIZE), (CLASSES, SIZE), (CLASSES,))
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    target = torch.randint(CLASSES, lead, generator=generator)
    target[torch.rand(lead, generator=generator) < 0.3] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("soft", "weighted", "label_smoothing"), list(itertools.product([False, True], [False, True], [0.0, 0.1]))
)
def test_all_options_together(soft, weighted, label_smoothing, reduction, softcap):
    hidden, weight, bias, target = inputs()
    if soft:
        target = torch.softmax(torch.randn(ROWS, CLASSES, dtype=torch.float64), -1)
    class_weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    logits = dense_logits(hidden, weight, bias, 1.3, softcap)
    stock = F.cross_entropy(logits, target, weight=class_weight, label_smoothing=label_smoothing, reduction=reduction)
    ours = xhead.linear_cross_entropy(
        hidden, weight, target, bias=bias, class_weight=class_weight, label_smoothing=label_smoothing,
        reduction=reduction, softcap=softcap, scale=1.3,
    )  # fmt: skip
    assert torch.allclose(ours, stock, atol=1e-12)
    upstream = torch.randn(stock.shape, dtype=torch.float64)
    for mine, true in zip(
        torch.autograd.grad(ours, (hidden, weight, bias), upstream),
        torch.autograd.grad(stock, (hidden, weight, bias), upstream),
        strict=True,
    ):
        assert relative_error(mine, true) < 1e-12


def test_penalty_lse_and_accuracy():
    hidden, weight, bias, target = inputs()
    logits = dense_logits(hidden, weight, bias)
    kept = target != -100
    lse = logits.logsumexp(-1)
    loss, found_lse, accuracy = xhead.linear_cross_entropy(
        hidden, weight, target, bias=bias, lse_penalty=0.2, return_lse=True, return_accuracy=True
    )
    expected = F.cross_entropy(logits, target) + 0.2 * lse[kept].square().mean()
    assert torch.allclose(loss, expected)
    assert torch.allclose(found_lse[kept], lse[kept]) and not found_lse[~kept].any()
    assert accuracy == (logits.argmax(-1) == target)[kept].float().mean()
    ours = torch.autograd.grad(loss + found_lse.sum(), hidden)[0]
    true = torch.autograd.grad(expected + lse[kept].sum(), hidden)[0]
    assert relative_error(ours, true) < 1e-12
    weights = torch.rand(CLASSES, dtype=torch.float64)
    plain = xhead.linear_cross_entropy(hidden, weight, target, bias=bias, class_weight=weights)
    both = xhead.linear_cross_entropy(hidden, weight, target, bias=bias, class_weight=weights, lse_penalty=1.0)
    assert torch.allclose(both - plain, dense_logits(hidden, weight, bias).logsumexp(-1)[kept].square().mean())


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 4)])
def test_any_leading_shape(lead):
    hidden, weight, bias, _ = inputs(lead=lead)
    target = torch.randint(CLASSES, lead)
    rows = xhead.linear_cross_entropy(hidden, weight, target, bias=bias, reduction="none")
    assert rows.shape == lead
    logits = dense_logits(hidden.reshape(-1, SIZE), weight, bias)
    assert torch.allclose(rows.flatten(), F.cross_entropy(logits, target.flatten(), reduction="none"))


def test_nothing_counts():
    hidden, weight, _, target = inputs()
    ignored = torch.full_like(target, -100)
    assert xhead.linear_cross_entropy(hidden, weight, ignored).isnan()
    total = xhead.linear_cross_entropy(hidden, weight, ignored, reduction="sum")
    assert total == 0
    total.backward()
    assert not hidden.grad.any() and not weight.grad.any()
    empty = xhead.linear_cross_entropy(hidden[:0], weight, target[:0], reduction="sum")
    assert empty == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    hidden, weight, bias, target = inputs(dtype)
    exact = F.cross_entropy(dense_logits(hidden, weight, bias), target)
    stock = F.cross_entropy(F.linear(hidden, weight, bias).float(), target)
    ours = xhead.linear_cross_entropy(hidden, weight, target, bias=bias, filter_eps=None)
    assert ours.dtype == torch.float32
    assert abs(ours.double() - exact) <= abs(stock.double() - exact) + 1e-5
    sides = (hidden, weight, bias)
    true, theirs, mine = (torch.autograd.grad(loss, sides) for loss in (exact, stock, ours))
    slack = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    for one, other, right in zip(mine, theirs, true, strict=True):
        assert one.dtype == dtype
        assert relative_error(one, right) <= relative_error(other, right) + slack


def test_autocast_is_that_of_a_linear_layer():
    hidden, weight, bias, target = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = xhead.linear_cross_entropy(hidden, weight, target, bias=bias)
        stock = F.cross_entropy(F.linear(hidden, weight, bias).float(), target)
    assert ours.dtype == torch.float32
    assert abs(ours - stock) < 1e-2
    for mine, true in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(stock, (hidden, weight)), strict=True
    ):
        assert mine.dtype == torch.float32
        assert relative_error(mine, true) < 0.02


def test_compiles_to_one_node():
    hidden, weight, bias, target = inputs(torch.float32)

    def step(hidden, weight, bias):
        return xhead.linear_cross_entropy(hidden * 2, weight, target, bias=bias, label_smoothing=0.1) * 3

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(hidden, weight, bias), (hidden, weight, bias))
    eager = torch.autograd.grad(step(hidden, weight, bias), (hidden, weight, bias))
    assert all(torch.allclose(mine, true, atol=1e-7) for mine, true in zip(ours, eager, strict=True))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no F.linear_cross_entropy")
@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": torch.randn(4, 2)},
        {"hidden": torch.randn(4, 3, dtype=torch.float64)},
        {"weight": torch.randn(3)},
        {"target": torch.tensor([0, 1, 2, 9])},
        {"target": torch.tensor([0, 1, 2, -3])},
        {"target": torch.tensor([0.0, 1.0, 2.0, 3.0])},
        {"target": torch.tensor([0, 1, 2, 3], dtype=torch.int32)},
        {"target": torch.tensor([True, False, True, True])},
        {"target": torch.tensor([0, 1, 2])},
        {"target": torch.rand(4, 4)},
        {"bias": torch.randn(4)},
        {"class_weight": torch.randn(4)},
        {"class_weight": torch.ones(5, dtype=torch.int64)},
        {"reduction": "average"},
        {"label_smoothing": 2.0},
        {"target": torch.rand(4, 5), "ignore_index": 2},
    ],
    ids=lambda wrong: "+".join(wrong),
)
def test_the_errors_are_those_of_pytorch(wrong):
    right = {"hidden": torch.randn(4, 3), "weight": torch.randn(5, 3), "target": torch.tensor([0, 1, 2, 3])} | wrong
    hidden, weight, target = right.pop("hidden"), right.pop("weight"), right.pop("target")
    renamed = {{"bias": "linear_bias", "class_weight": "weight"}.get(name, name): v for name, v in right.items()}
    with pytest.raises(Exception) as theirs:
        F.linear_cross_entropy(hidden, weight, target, **renamed)
    with pytest.raises(type(theirs.value)) as ours:
        xhead.linear_cross_entropy(hidden, weight, target, **right)
    assert len(str(ours.value)) > 20


def test_soft_targets_are_constants():
    hidden, weight, _, _ = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="must not require a gradient.*detach"):
        xhead.linear_cross_entropy(hidden, weight, torch.rand(ROWS, CLASSES, requires_grad=True))


def test_registry_names_what_it_knows():
    assert "cce" in xhead.list_losses()
    with pytest.raises(ValueError, match="unknown loss 'ccee'; known are .*cce"):
        get_loss("ccee")
    with pytest.raises(ValueError, match="unknown option smoothing for loss 'cce'; known are .*label_smoothing"):
        get_loss("cce", smoothing=0.1)
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        get_loss("cce", label_smoothing=-1.0)
    with pytest.raises(ValueError, match="functools.partial"):
        get_loss(lambda logits, labels: labels, label_smoothing=0.1)
    with pytest.raises(ValueError, match="'cce' is registered already"):
        register("cce", object)(lambda: None)


def test_a_loss_by_name_and_one_of_ones_own():
    hidden, weight, bias, target = inputs()
    kept = target != -100
    logits = xhead.LazyLogits(hidden[kept], weight, bias)
    labels = target[kept]
    rows = get_loss("cce", lse_penalty=0.1, label_smoothing=0.2)(logits, labels)
    dense = dense_logits(hidden[kept], weight, bias)
    expected = F.cross_entropy(dense, labels, reduction="none", label_smoothing=0.2)
    assert torch.allclose(rows, expected + 0.1 * dense.logsumexp(-1).square())

    def focal(logits, labels):
        statistics = logits.statistics("lse", "target", target=labels)
        log_p = statistics.target - statistics.lse
        return -((1 - log_p.exp()) ** 2) * log_p

    log_p = dense.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    assert torch.allclose(get_loss(focal)(logits, labels), -((1 - log_p.exp()) ** 2) * log_p)
    with pytest.raises(ValueError, match="class_weight.*'focal' does not take"):
        get_loss(focal)(logits, labels, class_weight=torch.ones(CLASSES))
