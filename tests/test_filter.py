"""The gradient filter: what is kept is exact, what is skipped is replaced by its closed form, memory stays bounded."""

import pytest
import torch

from tests.dense import relative_error
from xhead.engines import chunked, skipping
from xhead.engines.problem import FilterOptions, Problem
from xhead.statistics import filter_threshold, row_statistics


@pytest.fixture(autouse=True)
def filter_always(request):
    """The filter at work also where it would stand aside, but for the tests of just that."""
    if "aside" in request.node.name:
        yield
    else:
        with skipping.always():
            yield


def language_like(rows=700, classes=8000, size=48, seed=0, dtype=torch.float32):
    """Hidden states and weights with a frequency direction, topics, and targets that the model mostly expects."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    topics = normal(40, size) / size**0.5
    weight = topics[torch.randint(40, (classes,), generator=generator)] + 0.3 * normal(classes, size) / size**0.5
    frequency = -torch.log(torch.arange(classes).double() + 3)[torch.randperm(classes, generator=generator)]
    direction = torch.nn.functional.normalize(normal(size), dim=0)
    weight = weight + frequency[:, None] * direction / 4
    target = torch.multinomial(frequency.exp(), rows, replacement=True, generator=generator)
    hidden = 4 * direction + 2.5 * weight[target] + 1.2 * normal(rows, size)
    return hidden.to(dtype), weight.to(dtype), target


def gradients(hidden, weight, target, upstream=None, bias=None, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    softcap, scale = options.pop("softcap", None), options.pop("scale", 1.0)
    row_mask = options.pop("row_mask", None)
    found = row_statistics(
        hidden, weight, ("lse", "target"), target=target, bias=bias, softcap=softcap, scale=scale,
        row_mask=row_mask, engine="chunked", **options,
    )  # fmt: skip
    rows = found.lse - found.target
    (rows if upstream is None else rows * upstream).sum().backward()
    return [t.grad for t in (hidden, weight, bias) if t is not None]


def errors(inputs, **options):
    exact = gradients(*(t.double() if t.is_floating_point() else t for t in inputs), **_without_filter(options))
    return [relative_error(mine, true) for mine, true in zip(gradients(*inputs, **options), exact, strict=True)]


def _without_filter(options):
    names = ("filter_eps", "compensate", "filter_hidden_grad", "filter_weight_grad")
    kept = {name: value for name, value in options.items() if name not in names}
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kept.items()
    } | {"filter_eps": None}


def test_thresholds():
    assert filter_threshold("auto", torch.bfloat16) == 2.0**-12
    assert filter_threshold("auto", torch.float16) == 2.0**-15
    assert filter_threshold("auto", torch.float32) == 2.0**-28
    assert filter_threshold("auto", torch.float64) == filter_threshold(None, torch.float32) == 0.0
    assert filter_threshold(0.25, torch.float32) == 0.25


@pytest.mark.parametrize("eps", [2**-6, 2**-8, 2**-10, 2**-12])
def test_compensated_is_far_closer_than_dropped(eps):
    inputs = language_like()
    dropped = errors(inputs, filter_eps=eps, compensate=False)
    compensated = errors(inputs, filter_eps=eps)
    assert compensated[0] < dropped[0] / 4
    assert compensated[1] < dropped[1] / 1.1 or eps < 2**-11  # hardly anything is skipped there: both are small
    assert errors(inputs, filter_eps=None)[0] < 1e-5


def test_options_change_what_they_say():
    inputs = language_like()
    assert max(errors(inputs, filter_eps=2**-8, filter_hidden_grad=False)[:1]) < 1e-5
    assert errors(inputs, filter_eps=2**-8, filter_hidden_grad=False)[1] > 1e-4
    assert max(errors(inputs, filter_eps=2**-8, filter_weight_grad=False)[1:]) < 1e-5
    assert errors(inputs, filter_eps=2**-8, filter_weight_grad=False)[0] > 1e-4
    assert max(errors(inputs, filter_eps=2**-8, filter_weight_grad=False, filter_hidden_grad=False)) < 1e-5


def test_closed_form_is_exact_where_logits_do_not_vary_in_a_tile():
    """Equal logits a row inside each tile: the rank-one matrix is the softmax itself, and nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 16, generator=generator, dtype=torch.float64).expand(2048, 16) * 0.1
    target = torch.zeros(50, dtype=torch.int64)
    hidden_grad, weight_grad = gradients(hidden, weight, target, filter_eps=0.01)
    assert hidden_grad.abs().max() < 1e-12  # rows of weight that are all alike: every gradient cancels
    assert relative_error(weight_grad, gradients(hidden, weight, target, filter_eps=None)[1]) < 1e-12
    assert errors((hidden, weight, target), filter_eps=0.01, compensate=False)[1] > 0.01


def test_rows_of_the_residual_sum_to_zero():
    """With a bias, the compensated bias gradient still sums to 0: no mass is lost."""
    hidden, weight, target = language_like(dtype=torch.float64)
    bias = torch.randn(8000, dtype=torch.float64)
    grads = gradients(hidden, weight, target, bias=bias, filter_eps=2**-8)
    assert abs(float(grads[2].sum())) < 1e-9 * 700
    dropped = gradients(hidden, weight, target, bias=bias, filter_eps=2**-8, compensate=False)
    assert abs(float(dropped[2].sum())) > 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 20.0},
        {"scale": 0.7},
        {"bias": torch.randn(8000, generator=torch.Generator().manual_seed(1))},
        {"row_mask": torch.arange(700) % 4 > 0},
        {"upstream": torch.rand(700, generator=torch.Generator().manual_seed(2))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_compensation_under_every_option(options):
    inputs = language_like()
    assert (
        errors(inputs, filter_eps=2**-10, **options)[0]
        < 0.6 * errors(inputs, filter_eps=2**-10, compensate=False, **options)[0]
    )
    assert max(errors(inputs, filter_eps=2**-20, **options)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_its_own_threshold(dtype):
    inputs = language_like(dtype=dtype)
    hidden, weight, target = (t.double() if t.is_floating_point() else t for t in inputs)
    exact = gradients(hidden, weight, target, filter_eps=None)
    stock_hidden, stock_weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    torch.nn.functional.cross_entropy((stock_hidden @ stock_weight.T).float(), target, reduction="sum").backward()
    ours = gradients(*inputs, filter_eps="auto")
    for mine, stock, true in zip(ours, (stock_hidden.grad, stock_weight.grad), exact, strict=True):
        assert relative_error(mine, true) < relative_error(stock, true) + 1e-2


def test_every_kind_of_tile_gives_the_same(monkeypatch):
    """Saved entries, entries found again for want of memory, and dense tiles are three ways to one gradient."""
    inputs = language_like(dtype=torch.float64)
    saved = gradients(*inputs, filter_eps=2**-10)
    monkeypatch.setattr(skipping, "_ENTRY_BYTES", 12 * 400)
    found_again = gradients(*inputs, filter_eps=2**-10)
    monkeypatch.setattr(skipping, "_DENSE_SHARE", -1.0)
    dense = gradients(*inputs, filter_eps=2**-10)
    exact = gradients(*inputs, filter_eps=None)
    for one, two, three, true in zip(saved, found_again, dense, exact, strict=True):
        assert 0.5 < relative_error(two, true) / relative_error(one, true) < 2  # the bound on the sum is not yet final
        assert relative_error(three, true) < 1e-12
        assert relative_error(one, true) > 1e-9


def test_state_does_not_grow_with_the_rows():
    def state_bytes(rows):
        problem = Problem(
            torch.empty(rows, 8), torch.empty(50257, 8), ("lse", "target"), target=torch.empty(rows, dtype=torch.int64),
            filter=FilterOptions(threshold=2**-10),
        )  # fmt: skip
        sizes = [t.numel() * t.element_size() for t in chunked.empty_state(problem, True)]
        return sum(sizes) - rows * 4 * 4

    assert state_bytes(2048) < 6e6
    assert state_bytes(100_000) < state_bytes(4096) + 1e6


def test_unlike_statistics_are_not_filtered():
    """Entropy beside lse: the gradient stays exact rather than half filtered."""
    hidden, weight, target = language_like(dtype=torch.float64)

    def gradient(eps):
        leaf = hidden.clone().requires_grad_()
        found = row_statistics(leaf, weight, ("lse", "target", "entropy"), target=target, filter_eps=eps)
        (found.lse - found.target + found.entropy).sum().backward()
        return leaf.grad

    assert relative_error(gradient(2**-8), gradient(None)) < 1e-12


def test_argmax_names_the_class_and_not_its_place_in_the_order():
    hidden, weight, target = language_like()
    hidden.requires_grad_()
    found = row_statistics(hidden, weight, ("lse", "target", "argmax", "max", "mean"), target=target, filter_eps=2**-8)
    logits = hidden @ weight.T
    assert torch.equal(found.argmax, logits.argmax(-1))
    assert torch.allclose(found.target, logits.gather(1, target[:, None]).squeeze(1), atol=1e-4)


def test_stands_aside_where_it_does_not_pay(monkeypatch):
    """By a few rows: where most would be kept, the gradient is the exact one and no tile is recorded."""
    inputs = language_like(dtype=torch.float64)
    monkeypatch.setattr(skipping, "Recorder", None)
    exact, stood_aside = (gradients(*inputs, filter_eps=eps) for eps in (None, 2**-16))
    assert all(torch.equal(mine, true) for mine, true in zip(stood_aside, exact, strict=True))
    with skipping.always(), pytest.raises(TypeError):
        gradients(*inputs, filter_eps=2**-16)


def test_stands_aside_where_nothing_can_be_skipped():
    """A threshold that every entry passes: the gradient is the exact one, in the weight's own order."""
    hidden, weight, target = language_like(dtype=torch.float64)
    exact, stood_aside = (gradients(hidden, weight, target, filter_eps=eps) for eps in (None, 1e-30))
    assert all(relative_error(mine, true) < 1e-13 for mine, true in zip(stood_aside, exact, strict=True))


def test_deterministic():
    inputs = language_like()
    one, two = gradients(*inputs, filter_eps=2**-10), gradients(*inputs, filter_eps=2**-10)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_random_initialisation_is_nearly_all_closed_form():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator)
    weight = 0.02 * torch.randn(4000, 64, generator=generator)
    target = torch.randint(4000, (300,), generator=generator)
    compensated = errors((hidden, weight, target), filter_eps=2**-10)
    dropped = errors((hidden, weight, target), filter_eps=2**-10, compensate=False)
    assert max(compensated) < 0.01
    assert compensated[0] < dropped[0] / 4 and compensated[1] < dropped[1] / 2
