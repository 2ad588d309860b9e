"""The Triton engine's dense path: every statistic and its gradient, in slices of the classes."""

import itertools
import tempfile

import pytest
import torch

import xhead
from tests.dense import relative_error
from tests.statistic_case import CLOSED, NAMES, Case, check
from tests.test_triton import DEVICE, SLACK
from tests.tiny import assert_same_gradients, tokens, twins
from xhead import engines
from xhead.engines import triton as engine
from xhead.engines import triton_memory
from xhead.engines.problem import Problem
from xhead.statistics import row_statistics

pytest.importorskip("triton")

FLOAT = torch.float32


def case(rows=11, classes=301, dtype=FLOAT, **options):
    return Case(rows, classes, dtype=dtype, device=DEVICE, **options)


@pytest.fixture
def narrow(monkeypatch):
    """Slices of 64 classes, seven rows at a time."""
    monkeypatch.setattr(triton_memory, "PRODUCTS_BYTES", 1)
    monkeypatch.setattr(triton_memory, "SLICE_ROWS", 7)


@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", NAMES)
def test_each_statistic_alone(name, options):
    check(case(), (name,), "triton", dtype=FLOAT, **options)


@pytest.mark.parametrize(
    ("rows", "classes", "size"), [(1, 1, 1), (1, 2, 3), (3, 2049, 5), (9, 255, 70)], ids=lambda value: str(value)
)
def test_all_statistics_together(rows, classes, size):
    check(case(rows, classes, size=size, seed=rows, bias=False), NAMES, "triton", dtype=FLOAT, floor=1e-2, softcap=4.0)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_slices_and_blocks_of_rows(dtype):
    names = ("lse", "target", "mean", "variance", "entropy", "expectation", "complement_lse")
    some = case(17, 150, dtype=dtype, peak=0.2)
    logits = torch.nn.functional.linear(some.hidden, some.weight, some.bias).float().div(3.0).tanh().mul(3.0)
    plain = some.gradients(
        {
            "lse": logits.logsumexp(1),
            "target": logits.gather(1, some.target[:, None])[:, 0],
            "mean": logits.mean(1),
            "variance": logits.var(1, unbiased=False),
            "entropy": torch.distributions.Categorical(logits=logits).entropy(),
            "expectation": logits.softmax(1) @ some.values.float(),
            "complement_lse": _complement(logits, some.columns),
        }
    )
    check(some, names, "triton", dtype=dtype, plain=plain, softcap=3.0)


def _complement(logits, columns):
    mask = torch.zeros_like(logits, dtype=torch.bool)
    for row, listed in enumerate(columns.tolist()):
        mask[row, [column for column in listed if column >= 0]] = True
    return logits.masked_fill(mask, float("-inf")).logsumexp(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_mean_beside_a_cap(weighted):
    share = torch.linspace(0.1, 2.0, 301, device=DEVICE) if weighted else None
    check(case(), ("lse", "mean"), "triton", dtype=FLOAT, softcap=5.0, mean_weight=share)


def test_the_fused_forward_and_the_slices_agree(monkeypatch):
    some, names = case(40, 500), ("lse", "max", "argmax", "target")
    fused = some.found(names, engine="triton", filter_eps=None)
    monkeypatch.setattr(engine, "FUSED_FORWARD", False)
    sliced = some.found(names, engine="triton", filter_eps=None)
    for name in names:
        torch.testing.assert_close(fused[name], sliced[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_soft_targets(layout, softcap):
    some = case()
    some.target = {
        "rows": torch.rand(11, 301, device=DEVICE),
        "columns": torch.rand(301, 11, device=DEVICE).T,
        "expanded": torch.full((1, 1), 1 / 301, device=DEVICE).expand(11, 301),
    }[layout]
    check(some, ("lse", "target"), "triton", dtype=FLOAT, softcap=softcap)


def test_soft_targets_of_some_rows():
    some, mask = case(), torch.arange(11, device=DEVICE) % 2 == 0
    some.target = torch.rand(11, 301, device=DEVICE)
    ours, theirs = (some.found(("lse", "target"), engine=name, row_mask=mask) for name in ("triton", "chunked"))
    for one, other in zip(some.gradients(ours), some.gradients(theirs), strict=True):
        assert relative_error(one, other) < 1e-5


def test_fewer_columns_than_rows_of_which_some_are_ignored():
    some, mask = case(rows=9), torch.arange(9, device=DEVICE) > 0
    columns = torch.full((9, 1), -1, device=DEVICE)
    columns[3] = 7
    gradients = []
    for name in ("triton", "chunked"):
        found = row_statistics(
            some.hidden, some.weight, ("lse", "column_logits"), bias=some.bias, columns=columns, row_mask=mask,
            engine=name,
        )  # fmt: skip
        gradients.append(torch.autograd.grad(found.lse.sum() - found.column_logits.sum(), some.inputs))
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-5


def test_columns_of_hidden_and_weight_that_are_apart():
    some = case()
    some.hidden = torch.randn(19, 11, device=DEVICE).T.requires_grad_()
    some.weight = torch.randn(301, 38, device=DEVICE)[:, ::2].requires_grad_()
    check(some, ("lse", "target", "entropy"), "triton", dtype=FLOAT)


@pytest.mark.parametrize(
    ("pointwise", "parameters"),
    [
        ("softplus", ()), ("stablemax", ()), ("asymmetric", (0.0, 0.0)), ("asymmetric", (2.0, 0.0)),
        ("asymmetric", (4.0, 0.05)), ("adjusted_cosine", (24.0, 3.0, 0.5)),
    ],
)  # fmt: skip
def test_pointwise_sums(pointwise, parameters):
    some = case()
    options = {"bias": some.bias, "pointwise": pointwise, "pointwise_parameters": parameters, "scale": 1.3}
    found = row_statistics(some.hidden, some.weight, ("pointwise_sum",), engine="triton", **options).pointwise_sum
    doubled = [t.detach().double().requires_grad_() for t in some.inputs]
    options["bias"] = doubled[2]
    exact = row_statistics(*doubled[:2], ("pointwise_sum",), engine="reference", **options).pointwise_sum
    assert relative_error(found, exact) < 1e-5
    gradients = torch.autograd.grad(found.sum(), some.inputs), torch.autograd.grad(exact.sum(), doubled)
    for mine, true in zip(*gradients, strict=True):
        assert relative_error(mine, true) < 1e-5


@pytest.mark.usefixtures("narrow")
def test_softplus_keeps_what_is_far_below_one():
    hidden = torch.full((1, 1), -20.0, device=DEVICE)
    weight = torch.ones(1000, 1, device=DEVICE)
    found = row_statistics(hidden, weight, ("pointwise_sum",), pointwise="softplus", engine="triton").pointwise_sum
    torch.testing.assert_close(found, torch.full((1,), -20.0, device=DEVICE).exp() * 1000)


@pytest.mark.parametrize("counted", ["some", "none"])
def test_masked_rows(counted):
    some = case()
    mask = torch.arange(11, device=DEVICE) % 3 > 0
    mask &= counted == "some"
    found = some.found(NAMES, engine="triton", row_mask=mask, softcap=6.0, filter_eps=None)
    defined = some.defined(NAMES, softcap=6.0)
    for name in NAMES:
        assert not found[name][~mask].any()
        torch.testing.assert_close(found[name][mask].double(), defined[name][mask].double(), rtol=1e-5, atol=1e-5)
    keep = {name: mask[:, None].double() if name == "expectation" else mask.double() for name in NAMES}
    for mine, true in zip(some.gradients(found), some.gradients(defined, keep), strict=True):
        assert relative_error(mine, true) < 1e-5 if counted == "some" else not mine.any()


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "weight")])
def test_frozen_sides(frozen):
    some, whole = case(), case()
    for name in frozen:
        getattr(some, name).requires_grad_(False)
    for each in (some, whole):
        found = each.found(("lse", "entropy"), engine="triton")
        (found["lse"] + found["entropy"]).sum().backward()
    for name in ("hidden", "weight", "bias"):
        if name in frozen:
            assert getattr(some, name).grad is None
        else:
            torch.testing.assert_close(getattr(some, name).grad, getattr(whole, name).grad)


def test_tiny_upstream_gradients_in_float16():
    some = case(dtype=torch.float16, bias=False)
    found = some.found(("lse", "target"), engine="triton")
    rows = (found["lse"] - found["target"]) * 1e-7
    exact = some.defined(("lse", "target"))
    true = torch.autograd.grad((exact["lse"] - exact["target"]).sum(), some.inputs)
    for mine, wanted in zip(torch.autograd.grad(rows.sum() * 1e4, some.inputs), true, strict=True):
        assert relative_error(mine, wanted * 1e-3) < 5e-3


def test_confident_rows_keep_their_small_gradients():
    """p near 1: the softmax entry and the target cancel, and what is left must still be right in bfloat16."""
    hidden = (10.0 * torch.eye(8, device=DEVICE)).bfloat16().requires_grad_()
    weight = torch.eye(8, device=DEVICE).bfloat16()
    target = torch.arange(8, device=DEVICE)
    found = row_statistics(hidden, weight, ("lse", "target"), target=target, engine="triton", filter_eps=None)
    mine = torch.autograd.grad((found.lse - found.target).sum(), hidden)[0]
    exact = hidden.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact @ weight.double().T, target, reduction="sum")
    assert relative_error(mine, torch.autograd.grad(loss, exact)[0]) < SLACK[torch.bfloat16]


def test_a_class_that_is_ruled_out():
    some = case()
    with torch.no_grad():
        some.bias[[3, 260]] = float("-inf")
    names = ("lse", "entropy", "max", "argmax")
    found, other = some.found(names, engine="triton"), some.found(names, engine="chunked")
    for name in names:
        torch.testing.assert_close(found[name], other[name], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(some.gradients(found), some.gradients(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_unsupported_problem_goes_to_another_engine():
    hidden, weight = torch.randn(5, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    many = torch.randn(9, 17, device=DEVICE)
    for wrong in ({"hidden": hidden.double(), "weight": weight.double()}, {"values": many, "names": ("expectation",)}):
        arguments = {"hidden": hidden, "weight": weight, "names": ("lse",)} | wrong
        assert engines.select("auto", Problem(**arguments)) == "chunked"
        with pytest.raises(ValueError, match=r"engine 'triton' cannot compute .* these can: .*chunked"):
            row_statistics(**arguments, engine="triton")
    with pytest.raises(ValueError, match="'triton' cannot transform"):
        row_statistics(hidden, weight, ("lse",), engine="triton", transform=torch.tanh)


def test_a_device_without_triton_goes_to_another_engine(monkeypatch):
    monkeypatch.setattr(engine, "_available", lambda device: False)
    hidden, weight = torch.randn(5, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    assert torch.isfinite(row_statistics(hidden, weight, ("lse",)).lse).all()
    with pytest.raises(ValueError, match=f"'triton' cannot compute lse for torch.float32 on {DEVICE}"):
        row_statistics(hidden, weight, ("lse",), engine="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="rows that far apart fit in a sparse file, and on a GPU in nothing")
@pytest.mark.parametrize("eps", [None, 2**-3])
def test_rows_further_apart_than_32_bits_reach(eps, monkeypatch):
    monkeypatch.setattr(engine, "DENSE_SHARE", 1.0)
    stride, rows, size = 2**30 + 64, 4, 16
    near = torch.randn(2, rows, size)
    with tempfile.TemporaryDirectory() as folder:
        storage = torch.UntypedStorage.from_file(f"{folder}/far", shared=True, nbytes=2 * (2 * rows * stride))
        memory = torch.empty(0, dtype=torch.float16).set_(storage)
        far = [memory.as_strided((rows, size), (stride, 1), k * rows * stride).copy_(near[k]) for k in range(2)]
        target = torch.tensor([3, 0, 2, 1])
        results = []
        for hidden, weight in (far, near.half()):
            pair = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
            found = row_statistics(*pair, ("lse", "target"), target=target, engine="triton", filter_eps=eps)
            results.append([found.lse, *torch.autograd.grad((found.lse - found.target).sum(), pair)])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        del storage, memory, far, results, pair, found, hidden, one


@pytest.mark.parametrize(("loss", "options"), [("cce", {"label_smoothing": 0.1}), ("arcface", {}), ("sigmoid", {})])
def test_losses_of_a_patched_model(loss, options):
    engine_names = ("triton", "chunked")
    models = [xhead.patch(twins("LlamaForCausalLM")[1], loss=loss, engine=name, **options) for name in engine_names]
    for model in models:
        model.to(DEVICE)(**{name: value.to(DEVICE) for name, value in tokens().items()}).loss.backward()
        assert xhead.status(model).cut == 1
    assert_same_gradients(*models)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["triton", "auto"])
def test_one_graph(name):
    plain, model = (each.to(DEVICE) for each in twins("LlamaForCausalLM"))
    xhead.patch(model, engine=name)
    batch = {key: value.to(DEVICE) for key, value in tokens().items()}
    torch._dynamo.reset()
    actual, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss, plain(**batch).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, plain)
    assert xhead.status(model).materialized == 0


def test_operators_answer_for_shapes_and_types():
    some = case()
    for names, save in itertools.product((("lse", "target"), NAMES, CLOSED), (False, True)):
        problem = Problem(
            some.hidden.detach(), some.weight.detach(), names, target=some.target, values=some.values,
            row_offsets=torch.arange(12, device=DEVICE), columns=torch.arange(11, device=DEVICE),
        )  # fmt: skip
        _, state = engine.forward(problem, save)
        for made, promised in zip(state, engine.empty_state(problem, save), strict=True):
            assert (made.shape, made.dtype, made.device) == (promised.shape, promised.dtype, promised.device)
