"""The row statistics: every name, engine and option against its definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dense import dense_logits, dense_statistic, relative_error
from xhead import LazyLogits
from xhead.statistics import row_statistics

NAMES = (
    "lse", "target", "mean", "variance", "entropy", "expectation", "max", "argmax", "subset_lse", "complement_lse",
)  # fmt: skip
CLOSED = ("target", "mean", "variance", "subset_lse")
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


class Case:
    """Random inputs of one size, with everything that some statistic needs."""

    def __init__(self, rows=37, classes=301, size=19, dtype=torch.float64, seed=0, bias=True, peak=1.0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

        self.hidden = (peak * normal(rows, size)).to(dtype).requires_grad_()
        self.weight = normal(classes, size).to(dtype).requires_grad_()
        self.bias = (5 * normal(classes)).to(dtype).requires_grad_() if bias else None
        self.target = torch.randint(classes, (rows,), generator=generator).to(device)
        self.values = normal(classes, 3)
        self.columns = torch.randint(-1, classes, (rows, min(5, classes)), generator=generator).to(device)
        self.upstream = {name: normal(rows, 3) if name == "expectation" else normal(rows) for name in NAMES}

    @property
    def inputs(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def arguments(self, names):
        needed = {"target": "target", "expectation": "values", "subset_lse": "columns", "complement_lse": "columns"}
        return {needed[name]: getattr(self, needed[name]) for name in names if name in needed}

    def found(self, names, **options):
        statistics = row_statistics(self.hidden, self.weight, names, bias=self.bias, **self.arguments(names), **options)
        return {name: getattr(statistics, name) for name in names}

    def defined(self, names, mean_weight=None, target=None, **options):
        logits = dense_logits(self.hidden, self.weight, self.bias, **options)
        arguments = {
            "target": self.target if target is None else target,
            "values": self.values,
            "sets": self.columns.tolist(),
            "mean_weight": mean_weight,
        }
        return {name: dense_statistic(name, logits, **arguments) for name in names}

    def gradients(self, statistics, keep=None):
        total = sum(
            (value.double() * (self.upstream[name] if keep is None else self.upstream[name] * keep[name])).sum()
            for name, value in statistics.items()
            if name not in ("max", "argmax")
        )
        return torch.autograd.grad(total, self.inputs)


def check(case, names, engine, dtype=torch.float64, plain=None, floor=1e-30, **options):
    """Values and gradients: no worse than plain PyTorch's in the same dtype, plus a slack."""
    found = case.found(names, engine=engine, filter_eps=None, **options)
    defined = case.defined(names, **options)
    for name in names:
        assert found[name].dtype == (torch.int64 if name == "argmax" else torch.promote_types(dtype, torch.float32))
        if name == "argmax":
            assert torch.equal(found[name], defined[name])
            continue
        finite = defined[name].isfinite()
        assert torch.equal(found[name].isfinite(), finite)
        assert relative_error(found[name][finite], defined[name][finite], floor) <= SLACK[dtype]
    if set(names) - {"max", "argmax"}:
        exact = case.gradients(defined)
        ours = case.gradients(found)
        for index, (mine, true) in enumerate(zip(ours, exact, strict=True)):
            allowed = SLACK[dtype] + (0.0 if plain is None else relative_error(plain[index], true))
            assert mine.dtype == dtype
            assert relative_error(mine, true, floor) <= allowed


OPTIONS = [
    {},
    {"scale": 0.3},
    {"scale": 0.7, "softcap": 5.0},
    {"mean_weight": torch.linspace(0.1, 2.0, 301, dtype=torch.float64)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("name", NAMES)
def test_each_statistic_alone(name, options):
    for engine in ("reference", "chunked"):
        check(Case(), (name,), engine, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("engine", ["reference", "chunked"])
def test_all_statistics_together(engine, options):
    check(Case(bias=False), NAMES, engine, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CLOSED)
def test_gram_engine(name, bias):
    check(Case(bias=bias), (name,), "gram")
    check(Case(bias=bias), CLOSED, "gram", scale=-0.4)


def test_gram_needs_linear_logits():
    with pytest.raises(ValueError, match="gram.*cannot.*softcap=5.0.*chunked"):
        Case().found(("variance",), engine="gram", softcap=5.0)
    Case().found(("target", "subset_lse"), engine="gram", softcap=5.0)


def test_auto_takes_gram_where_it_can():
    from xhead import engines
    from xhead.engines.problem import Problem

    case = Case()
    problem = Problem(case.hidden, case.weight, ("mean", "variance"))
    assert engines.select("auto", problem) == "gram"
    assert engines.select("auto", problem.having(("mean", "lse"))) == "chunked"


@pytest.mark.parametrize(
    ("rows", "classes", "size"), [(1, 1, 1), (1, 2, 3), (3, 257, 5), (513, 255, 7), (600, 1025, 3), (2, 700, 600)]
)
@pytest.mark.parametrize("engine", ["chunked", "gram"])
def test_sizes_across_the_tiles(engine, rows, classes, size):
    names = CLOSED if engine == "gram" else NAMES
    check(Case(rows, classes, size, seed=rows), names, engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peak", [1.0, 4.0], ids=["flat", "peaky"])
def test_low_precision_is_no_worse_than_pytorch(dtype, peak):
    names = ("lse", "target", "mean", "entropy", "expectation", "complement_lse")
    case = Case(size=63, dtype=dtype, peak=peak / 8)
    exact = case.defined(names)
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias).float()
    plain = {
        name: dense_statistic(
            name, logits, target=case.target, values=case.values.float(), sets=case.columns.tolist()
        ).double()
        for name in names
        if name not in ("expectation", "mean")
    }
    plain["mean"] = logits.mean(-1)
    plain["expectation"] = logits.softmax(-1) @ case.values.float()
    found = case.found(names, engine="chunked", filter_eps=None)
    for name in names:
        allowed = relative_error(plain[name], exact[name]) + SLACK[dtype]
        assert relative_error(found[name], exact[name]) <= allowed, name
        assert found[name].dtype == torch.float32
    true, theirs, ours = case.gradients(exact), case.gradients(plain), case.gradients(found)
    for mine, other, right in zip(ours, theirs, true, strict=True):
        assert relative_error(mine, right) <= relative_error(other, right) + SLACK[dtype]


def test_confident_rows_keep_their_small_gradients():
    """p near 1: the softmax entry and the target cancel, and what is left must still be right."""
    hidden = torch.eye(8).mul(14.0).requires_grad_()
    weight = torch.eye(8).mul(1.0).repeat(1, 1).requires_grad_()
    target = torch.arange(8)
    statistics = row_statistics(hidden, weight, ("lse", "target"), target=target, engine="chunked", filter_eps=2**-8)
    (statistics.lse - statistics.target).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ weight.detach().double().T, target, reduction="sum").backward()
    assert relative_error(hidden.grad, exact.grad) < 0.02


def test_large_bias_and_depth_over_every_block():
    case = Case(rows=9, classes=40, size=1100, peak=0.05)
    with torch.no_grad():
        case.bias.mul_(200.0)
    check(case, ("lse", "target", "entropy", "variance"), "chunked", floor=1.0)


@pytest.mark.parametrize("engine", ["reference", "chunked", "gram"])
def test_masked_rows_are_zero_and_pass_no_gradient(engine):
    names = CLOSED if engine == "gram" else NAMES
    case = Case()
    mask = torch.arange(37) % 3 > 0
    found = case.found(names, engine=engine, row_mask=mask, filter_eps=None)
    defined = case.defined(names)
    for name in names:
        assert not found[name][~mask].any()
        assert torch.allclose(found[name][mask].double(), defined[name][mask].double())
    keep = {name: mask[:, None].double() if name == "expectation" else mask.double() for name in names}
    for mine, true in zip(case.gradients(found), case.gradients(defined, keep), strict=True):
        assert relative_error(mine, true) < 1e-11
    assert not torch.autograd.grad(sum(case.found(("lse",), row_mask=mask)["lse"]), case.hidden)[0][~mask].any()


@pytest.mark.parametrize("engine", ["reference", "chunked", "gram"])
def test_no_row_counts(engine):
    names = CLOSED if engine == "gram" else NAMES
    case = Case()
    found = case.found(names, engine=engine, row_mask=torch.zeros(37, dtype=torch.bool))
    assert all(not value.any() and value.shape[0] == 37 for value in found.values())
    assert all(not gradient.any() for gradient in case.gradients(found))


def test_no_rows_at_all():
    case = Case(rows=0)
    for engine in ("reference", "chunked"):
        found = case.found(("lse", "target", "mean"), engine=engine)
        assert found["lse"].shape == (0,)
        assert all(not gradient.any() for gradient in case.gradients(found))


def test_leading_shapes():
    case = Case(rows=24)
    flat = case.found(("lse", "expectation", "argmax"))
    shaped = row_statistics(
        case.hidden.view(2, 3, 4, 19), case.weight, ("lse", "expectation", "argmax"), bias=case.bias, values=case.values
    )
    assert shaped.lse.shape == shaped.argmax.shape == (2, 3, 4)
    assert shaped.expectation.shape == (2, 3, 4, 3)
    assert torch.equal(shaped.lse.flatten(), flat["lse"])
    one = row_statistics(case.hidden[0], case.weight, ("lse", "target"), bias=case.bias, target=case.target[0])
    assert one.lse.shape == () and torch.allclose(one.lse, flat["lse"][0])
    vector = row_statistics(case.hidden, case.weight, ("expectation",), bias=case.bias, values=case.values[:, 0])
    assert vector.expectation.shape == (24,)


def test_non_contiguous_input():
    case = Case()
    wide_hidden = torch.randn(37, 38, dtype=torch.float64)[:, ::2].requires_grad_()
    wide_weight = torch.randn(19, 301, dtype=torch.float64).T.requires_grad_()
    case.hidden, case.weight = wide_hidden, wide_weight
    check(case, NAMES, "chunked")


def test_soft_targets():
    case = Case()
    case.target = torch.rand(37, 301, dtype=torch.float64)
    for options in ({}, {"softcap": 3.0}):
        check(case, ("lse", "target"), "chunked", **options)


def test_sets_of_columns_as_sparse_rows():
    case = Case()
    dense = torch.zeros(37, 301)
    for row, columns in enumerate(case.columns.tolist()):
        for column in set(columns) - {-1}:
            dense[row, column] = 1.0
    dense[5] = 0.0
    dense[6] = 1.0
    case.columns[5] = -1
    defined = case.defined(("subset_lse", "complement_lse"))
    with pytest.warns(UserWarning, match="Sparse CSR") if not _sparse_warned() else _nothing():
        sparse = dense.to_sparse_csr()
    found = row_statistics(
        case.hidden, case.weight, ("subset_lse", "complement_lse", "lse"), bias=case.bias, columns=sparse
    )
    rows = torch.arange(37) != 6
    assert torch.allclose(found.subset_lse[rows], defined["subset_lse"][rows])
    assert torch.allclose(found.complement_lse[rows], defined["complement_lse"][rows])
    assert torch.allclose(found.subset_lse[6], found.lse[6])
    assert found.complement_lse[6] == float("-inf")


_seen = []


def _sparse_warned():
    """PyTorch says once a process that sparse CSR is in beta."""
    import warnings

    if not _seen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(1, 1).to_sparse_csr()
        _seen.append(True)
    return True


def _nothing():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_side_gets_no_gradient_and_costs_no_product(frozen, monkeypatch):
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    products = []
    addmm = torch.Tensor.addmm_

    def counted(out, *arguments, **keywords):
        products.append(tuple(out.shape))
        return addmm(out, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "addmm_", counted)
    case.found(("lse",), filter_eps=None, engine="chunked")["lse"].sum().backward()
    assert getattr(case, frozen).grad is None
    assert all(t.grad is not None for t in case.inputs if t.requires_grad)
    assert ((37, 19) in products) == (frozen != "hidden")
    assert ((301, 19) in products) == (frozen != "weight")


def test_backward_twice_over_a_retained_graph():
    case = Case()
    lse = case.found(("lse", "variance"))
    total = lse["lse"].sum() + lse["variance"].sum()
    first = torch.autograd.grad(total, case.inputs, retain_graph=True)
    second = torch.autograd.grad(total, case.inputs)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("engine", ["chunked", "gram"])
def test_second_derivatives(engine):
    case = Case(rows=3, classes=5, size=4)
    names = CLOSED if engine == "gram" else ("lse", "target", "entropy", "expectation", "complement_lse", "mean")

    def function(hidden, weight, bias):
        statistics = row_statistics(
            hidden, weight, names, bias=bias, engine=engine, scale=0.8, filter_eps=None, **case.arguments(names)
        )
        return tuple(getattr(statistics, name) for name in names)

    case.columns = torch.tensor([[0, 1], [2, -1], [4, 3]])
    torch.autograd.gradcheck(function, case.inputs)
    torch.autograd.gradgradcheck(function, case.inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hidden_gives_nan(value):
    case = Case(dtype=torch.float32)
    with torch.no_grad():
        case.hidden[4, 2] = value
    for eps in (None, 2**-8):
        found = case.found(("lse", "target"), filter_eps=eps)
        assert found["lse"][4].isnan()
        assert found["lse"][:4].isfinite().all()
        hidden_grad = case.gradients(found)[0]
        assert hidden_grad[4].isnan().any()


def test_a_class_that_is_ruled_out():
    """A bias of -inf takes a class out without NaN in values or gradients."""
    case = Case()
    with torch.no_grad():
        case.bias[[3, 260]] = float("-inf")
    names = ("lse", "entropy", "max", "argmax")
    found = case.found(names, filter_eps=None)
    logits = dense_logits(case.hidden, case.weight, case.bias)
    keep = torch.ones(301, dtype=torch.bool)
    keep[[3, 260]] = False
    assert torch.allclose(found["lse"], logits[:, keep].logsumexp(-1))
    assert torch.allclose(found["entropy"], torch.distributions.Categorical(logits=logits[:, keep]).entropy())
    assert all(gradient.isfinite().all() for gradient in case.gradients(found))


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40),
    classes=st.integers(1, 600),
    size=st.integers(1, 24),
    seed=st.integers(0, 1000),
    peak=st.sampled_from([0.01, 1.0, 30.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
)
def test_lse_and_target_whatever_the_sizes(rows, classes, size, seed, peak, softcap):
    case = Case(rows, classes, size, seed=seed, peak=peak)
    check(case, ("lse", "target", "entropy", "max"), "chunked", softcap=softcap, floor=1.0)


BAD = [
    (RuntimeError, "hidden must be .* D = 19", {"hidden": torch.zeros(3, 18, dtype=torch.float64)}),
    (RuntimeError, "same floating dtype.*float32.*float64", {"hidden": torch.zeros(3, 19)}),
    (RuntimeError, "weight must be 2-D", {"weight": torch.zeros(19, dtype=torch.float64)}),
    (RuntimeError, "weight has no rows", {"weight": torch.zeros(0, 19, dtype=torch.float64)}),
    (RuntimeError, r"bias must have shape \(301,\)", {"bias": torch.zeros(300, dtype=torch.float64)}),
    (ValueError, "unknown statistic 'lsee'; known are lse", {"names": ("lsee",)}),
    (ValueError, "no statistic was asked for", {"names": ()}),
    (ValueError, "'target' needs the argument target=", {"names": ("target",)}),
    (ValueError, "'expectation' needs the argument values=", {"names": ("expectation",)}),
    (IndexError, "target 301 is out of bounds: classes are 0 to 300", {"target": torch.full((37,), 301)}),
    (IndexError, "target -1 is out of bounds", {"target": torch.full((37,), -1)}),
    (RuntimeError, "Long or Byte.*int32.*target.long", {"target": torch.zeros(37, dtype=torch.int32)}),
    (ValueError, r"target must have shape \(37,\).*\(36,\)", {"target": torch.zeros(36, dtype=torch.int64)}),
    (RuntimeError, r"probabilities must have shape \(37, 301\)", {"target": torch.zeros(37, 300)}),
    (RuntimeError, r"values must be \(301,\)", {"values": torch.zeros(300)}),
    (RuntimeError, "values must not require", {"values": torch.zeros(301, requires_grad=True)}),
    (IndexError, "column 400 is out of bounds", {"columns": torch.full((37, 1), 400)}),
    (RuntimeError, "columns must be integers", {"columns": torch.zeros(37, 1)}),
    (RuntimeError, "mean_weight must have shape", {"mean_weight": torch.zeros(3)}),
    (ValueError, "softcap must be a positive number or None, got 0.0", {"softcap": 0.0}),
    (ValueError, 'filter_eps must be "auto", None or a number', {"filter_eps": "fast"}),
    (ValueError, 'filter_eps must be "auto", None or a number', {"filter_eps": 1.5}),
    (ValueError, "unknown engine 'cuda'; known are", {"engine": "cuda"}),
]


@pytest.mark.parametrize(("error", "message", "wrong"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_misuse_is_named(error, message, wrong):
    case = Case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "names": ("lse",), "bias": case.bias} | wrong
    with pytest.raises(error, match=message):
        row_statistics(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("names"), **arguments)


def test_lazy_logits_give_the_same():
    case = Case()
    logits = LazyLogits(case.hidden, case.weight, case.bias, softcap=4.0, scale=0.5)
    found = logits.statistics("lse", "target", target=case.target)
    defined = case.defined(("lse", "target"), softcap=4.0, scale=0.5)
    assert torch.allclose(found.lse, defined["lse"]) and torch.allclose(found.target, defined["target"])
    assert found.mean is None
    assert torch.allclose(logits.materialize(), dense_logits(case.hidden, case.weight, case.bias, 0.5, 4.0))
