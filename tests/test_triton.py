"""The Triton engine: on a GPU where there is one, else in triton's interpreter, against float64 definitions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xhead
from tests.dense import dense_logits, dense_statistic, relative_error
from tests.test_filter import language_like
from xhead.engines import active_tiles, class_order
from xhead.engines import triton as engine
from xhead.statistics import row_statistics

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLACK = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def as_numbered(monkeypatch):
    """The classes stay in the order of their numbers, so that two calls skip the same."""
    class_order.clear()
    monkeypatch.setattr(class_order, "learn", lambda operands, lse: None)


@pytest.fixture
def filter_always(monkeypatch):
    """The filter at work also where so many tiles are active that it would not pay."""
    monkeypatch.setattr(engine, "DENSE_SHARE", 1.0)


def make(rows=150, classes=517, size=72, dtype=torch.float32, spread=0.4, bias=False):
    hidden = torch.randn(rows, size, device=DEVICE).to(dtype).requires_grad_()
    weight = (spread * torch.randn(classes, size, device=DEVICE)).to(dtype).requires_grad_()
    offsets = (10 * torch.randn(classes, device=DEVICE)).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offsets, torch.randint(classes, (rows,), device=DEVICE)


def rows_of(hidden, weight, bias, target, engine="triton", **options):
    found = row_statistics(hidden, weight, ("lse", "target"), bias=bias, target=target, engine=engine, **options)
    return found.lse - found.target


def gradients(inputs, upstream=None, **options):
    hidden, weight, bias, target = inputs
    rows = rows_of(hidden, weight, bias, target, **options)
    upstream = torch.full_like(rows, 1 / max(rows.numel(), 1)) if upstream is None else upstream
    return torch.autograd.grad((rows * upstream).sum(), [t for t in (hidden, weight, bias) if t is not None])


def doubled(inputs):
    return [None if t is None else t.detach().double().requires_grad_() for t in inputs[:3]] + [inputs[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "bias", "scale"), [(None, False, 1.0), (15.0, True, 0.7), (None, True, 2.0)])
def test_statistics_and_gradients_are_those_of_the_definition(dtype, softcap, bias, scale):
    inputs = make(dtype=dtype, bias=bias)
    hidden, weight, offsets, target = inputs
    found = row_statistics(
        hidden, weight, ("lse", "target", "max", "argmax", "mean" if softcap is None else "max"), bias=offsets,
        target=target, softcap=softcap, scale=scale, engine="triton", filter_eps=None,
    )  # fmt: skip
    logits = dense_logits(hidden, weight, offsets, scale, softcap)
    for name in ("lse", "target", "max"):
        assert relative_error(getattr(found, name), dense_statistic(name, logits, target=target)) < 1e-5
    assert logits.gather(1, found.argmax[:, None])[:, 0].sub(logits.amax(1)).abs().max() < 1e-5
    if softcap is None:
        assert relative_error(found.mean, logits.mean(1)) < 1e-5
    upstream = torch.randn(target.shape[0], device=DEVICE)
    options = {"softcap": softcap, "scale": scale, "filter_eps": None}
    mine = gradients(inputs, upstream, **options)
    true = gradients(doubled(inputs), upstream.double(), engine="reference", **options)
    stock = torch.autograd.grad(
        (torch.nn.functional.cross_entropy(
            _stock_logits(hidden, weight, offsets, scale, softcap), target, reduction="none") * upstream).sum(),
        [t for t in (hidden, weight, offsets) if t is not None],
    )  # fmt: skip
    for one, exact, same_dtype in zip(mine, true, stock, strict=True):
        assert relative_error(one, exact) <= relative_error(same_dtype, exact) + SLACK[dtype]


def _stock_logits(hidden, weight, bias, scale, softcap):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def test_ignored_rows_and_frozen_sides():
    hidden, weight, _, target = make()
    mask = torch.rand(target.shape[0], device=DEVICE) < 0.6
    everything = gradients((hidden, weight, None, target), row_mask=mask)
    true = gradients(doubled((hidden, weight, None, target)), engine="reference", row_mask=mask)
    assert all(relative_error(one, exact) < 1e-5 for one, exact in zip(everything, true, strict=True))
    assert torch.all(everything[0][~mask] == 0)
    rows = rows_of(hidden.detach(), weight, None, target, row_mask=mask)
    assert relative_error(torch.autograd.grad(rows.mean(), weight)[0], everything[1]) < 1e-6
    rows = rows_of(hidden, weight.detach(), None, target, row_mask=mask)
    assert relative_error(torch.autograd.grad(rows.mean(), hidden)[0], everything[0]) < 1e-6


@pytest.mark.usefixtures("filter_always")
def test_ignored_rows_beside_the_filter():
    hidden, weight, _, target = like_a_language()
    mask = torch.arange(target.shape[0], device=DEVICE) % 3 > 0
    with torch.no_grad():
        hidden[~mask] = float("nan")
    mine = gradients((hidden, weight, None, target), filter_eps=2**-6, row_mask=mask)
    rows = hidden[mask].detach().requires_grad_()
    alone = gradients((rows, weight, None, target[mask]), torch.full((int(mask.sum()),), 1 / 140), filter_eps=2**-6)
    assert relative_error(mine[0][mask], alone[0]) < 1e-6
    assert relative_error(mine[1], alone[1]) < 1e-6
    assert torch.all(mine[0][~mask] == 0)


@pytest.mark.usefixtures("filter_always")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_forms_and_ignored_rows_beside_the_filter(dtype):
    """Added to the sums of the tiles for some rows at a time, and to those that count alone."""
    hidden, weight, bias, target = make(rows=700, classes=300, dtype=dtype, bias=True)
    mask = torch.rand(700, device=DEVICE) < 0.7
    columns = torch.randint(300, (700, 2), device=DEVICE)
    upstream = torch.randn(4, 700, device=DEVICE)

    def gradients_of(tensors, engine, eps):
        found = row_statistics(
            *tensors[:2], ("lse", "target", "mean", "variance", "subset_lse"), bias=tensors[2], target=target,
            columns=columns, row_mask=mask, engine=engine, filter_eps=eps,
        )  # fmt: skip
        rows = (found.lse - found.target, found.mean, found.variance, found.subset_lse)
        total = sum((row * factor).sum() for row, factor in zip(rows, upstream.to(rows[0].dtype), strict=True))
        return torch.autograd.grad(total, tensors)

    inputs = (hidden, weight, bias)
    mine = gradients_of(inputs, "triton", 1e-37)
    true = gradients_of([t.detach().double().requires_grad_() for t in inputs], "reference", None)
    for one, exact in zip(mine, true, strict=True):
        assert relative_error(one, exact) < SLACK[dtype]
    assert not mine[0][~mask].any()


@pytest.mark.usefixtures("filter_always")
def test_a_class_that_is_ruled_out_beside_the_filter():
    hidden, weight, _, target = like_a_language()
    bias = torch.zeros(weight.shape[0], device=DEVICE)
    bias[1000:1200] = float("-inf")
    bias.requires_grad_()
    keep = (target < 1000) | (target >= 1200)
    inputs = (hidden[keep].detach().requires_grad_(), weight, bias, target[keep])
    mine = gradients(inputs, filter_eps=2**-6)
    true = gradients(doubled(inputs), engine="reference", filter_eps=None)
    assert all(relative_error(one, exact) < 0.1 for one, exact in zip(mine, true, strict=True))


@pytest.mark.usefixtures("filter_always")
@pytest.mark.parametrize("eps", [None, 2**-7])
def test_a_bias_alone_trains(eps):
    hidden, weight, bias, target = make(rows=70, bias=True)
    frozen = (hidden.detach(), weight.detach())
    alone = torch.autograd.grad(rows_of(*frozen, bias, target, filter_eps=eps).mean(), bias)[0]
    assert relative_error(alone, gradients((hidden, weight, bias, target), filter_eps=eps)[2]) < 1e-5


@pytest.mark.usefixtures("filter_always")
@pytest.mark.parametrize(("eps", "error"), [(None, 1e-5), (2**-20, 1e-3)])
@pytest.mark.parametrize("size", [1, 65, 130, 260])
def test_hidden_states_wider_than_any_block(size, eps, error):
    inputs = make(rows=40, classes=300, size=size, spread=size**-0.5, bias=True)
    mine = gradients(inputs, filter_eps=eps)
    true = gradients(doubled(inputs), engine="reference", filter_eps=None)
    assert all(relative_error(one, exact) < error for one, exact in zip(mine, true, strict=True))


@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_counts(rows):
    hidden, weight, _, target = make(rows=rows)
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    loss = rows_of(hidden, weight, None, target, row_mask=mask).sum()
    assert loss == 0
    assert all(torch.all(grad == 0) for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.usefixtures("filter_always")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_nan_comes_out():
    hidden, weight, _, target = make(rows=70)
    with torch.no_grad():
        hidden[3, 5] = float("nan")
    rows = rows_of(hidden, weight, None, target, filter_eps=2**-6)
    assert rows[3].isnan()
    assert not rows[4].isnan()
    assert torch.autograd.grad(rows.sum(), weight)[0].isnan().any()


def like_a_language(dtype=torch.float32):
    """Classes by falling frequency, as tokenizers number them."""
    hidden, weight, target = language_like(rows=140, classes=1800, size=48, dtype=torch.float64)
    order = (weight @ hidden.mean(0)).argsort(descending=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in (hidden, weight[order])]
    return *tensors, None, position[target].to(DEVICE)


@pytest.mark.usefixtures("filter_always")
@pytest.mark.parametrize("eps", [2**-5, 2**-6])
def test_compensated_is_closer_than_dropped(eps):
    inputs = like_a_language()
    true = gradients(doubled(inputs), engine="reference", filter_eps=None)
    compensated = gradients(inputs, filter_eps=eps)
    dropped = gradients(inputs, filter_eps=eps, compensate=False)
    for mine, worse, exact in zip(compensated, dropped, true, strict=True):
        assert relative_error(mine, exact) < relative_error(worse, exact) / 1.5
    assert relative_error(compensated[0], true[0]) < relative_error(dropped[0], true[0]) / 4
    # A row's residuals sum to 0 and so do those of what replaces them: the classes' gradients sum to nearly nothing.
    assert compensated[1].sum(0).norm() < 0.1 * dropped[1].sum(0).norm()


@pytest.mark.usefixtures("filter_always")
def test_a_threshold_that_keeps_all_is_exact():
    inputs = make()
    true = gradients(doubled(inputs), engine="reference", filter_eps=None)
    for mine, exact in zip(gradients(inputs, filter_eps=1e-37), true, strict=True):
        assert relative_error(mine, exact) < 1e-5


def test_many_active_tiles_are_multiplied_out_and_exact():
    """At initialisation nearly all tiles hold an entry above a small threshold."""
    inputs = make(spread=0.01)
    for mine, exact in zip(gradients(inputs, filter_eps=2**-12), gradients(inputs, filter_eps=None), strict=True):
        assert torch.equal(mine, exact)


def watch_shares(monkeypatch):
    """The share of active tiles of each filtered backward from here on, in a list that grows."""
    shares = []
    add_gradients = active_tiles.ActiveTiles.add_gradients

    def watched(tiles, *arguments):
        shares.append(tiles.share)
        return add_gradients(tiles, *arguments)

    monkeypatch.setattr(active_tiles.ActiveTiles, "add_gradients", watched)
    return shares


def test_few_active_tiles_are_visited_alone(monkeypatch):
    inputs, shares = like_a_language(), watch_shares(monkeypatch)
    filtered = gradients(inputs, filter_eps=2**-4)
    assert 0 < shares[0] <= engine.DENSE_SHARE
    exact = gradients(inputs, filter_eps=None)
    assert len(shares) == 1
    assert 1e-4 < relative_error(filtered[0], exact[0]) < 0.2


@pytest.mark.usefixtures("filter_always")
def test_few_tiles_at_a_time_give_the_same(monkeypatch):
    """But for the last rounding of a few numbers: sums in half precision would be off by more."""
    inputs = like_a_language(torch.bfloat16)
    at_once = gradients(inputs, filter_eps=2**-8)
    monkeypatch.setattr(active_tiles, "residual_bytes", lambda *_: 1)
    a_few = gradients(inputs, filter_eps=2**-8)
    assert all(relative_error(one, other) < 1.5e-3 for one, other in zip(a_few, at_once, strict=True))


@pytest.mark.usefixtures("filter_always")
def test_the_same_bits_each_time():
    inputs = like_a_language(torch.bfloat16)
    first, second = (gradients(inputs, filter_eps=2**-8) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_cross_entropy_with_all_its_options():
    hidden, weight, bias, target = make(bias=True)
    target[::5] = -100
    options = {"label_smoothing": 0.1, "lse_penalty": 1e-3, "scale": 0.5, "ignore_index": -100}
    mine = xhead.linear_cross_entropy(hidden, weight, target, bias=bias, engine="triton", **options)
    other = xhead.linear_cross_entropy(hidden, weight, target, bias=bias, engine="chunked", **options)
    assert relative_error(mine, other) < 1e-6
    for one, two in zip(*(torch.autograd.grad(loss, (hidden, weight, bias)) for loss in (mine, other)), strict=True):
        assert relative_error(one, two) < 1e-5


def test_kernels_compile_for_gpus_that_are_not_here():
    """Tensor-core instructions, nothing spilled, and shared memory that fits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels"), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.ahead_of_time"], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 86
    for record in records:
        assert record["tensor_core"] and record["fits"], record
        assert record["spilled"] == 0, record
        assert not record["narrow_strides"], record
        if "described" in record["kernel"]:
            assert record["described_copies"] > 0, record
            assert record["specialised_warps"] == record["specialised"], record
