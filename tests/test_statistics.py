"""The row statistics: every name, engine and option against its definition in float64."""

import pytest
import torch

from tests.dense import dense_statistic, relative_error
from tests.statistic_case import CLOSED, NAMES, SLACK, Case, check
from xhead.statistics import row_statistics

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


def test_a_gpu_without_its_kernels_is_told_of_once(monkeypatch, recwarn):
    from xhead import engines
    from xhead.engines.problem import Problem

    problem = Problem(torch.randn(6, 5), torch.randn(9, 5), ("lse",))
    engines._tell_of_triton.cache_clear()
    monkeypatch.setattr(engines.triton, "eligible", lambda problem: True)
    assert engines.select("auto", problem) == "chunked" and not recwarn.list  # not on a GPU
    monkeypatch.setattr(engines, "on_gpu", lambda problem: True)
    assert engines.select("chunked", problem) == "chunked" and not recwarn.list
    assert [engines.select("auto", problem) for _ in range(2)] == ["chunked"] * 2
    assert len(recwarn.list) == 1 and "benchmarks.gpu" in str(recwarn.list[0].message)


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
        found = case.found(("lse", "target", "mean", "variance"), engine=engine)
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


@pytest.mark.parametrize(("names", "rows"), [(("lse", "column_logits"), 9), (("variance", "column_logits"), 2)])
def test_fewer_entries_of_columns_than_rows(names, rows):
    """Numbers an entry go beside numbers a row: by row mask, and where tiles cost less than the closed forms."""
    found = []
    for engine in ("chunked", "reference"):
        case = Case(rows=rows, classes=31, size=19)
        columns, mask = torch.full((rows, 2), -1), torch.arange(rows) >= rows // 2
        columns[-1, 0] = 3
        statistics = row_statistics(
            case.hidden, case.weight, names, columns=columns, row_mask=mask, filter_eps=None, engine=engine
        )
        values = [getattr(statistics, name) for name in names]
        found.append([*values, *torch.autograd.grad(sum(v.sum() for v in values), [case.hidden, case.weight])])
    for chunked, reference in zip(*found, strict=True):
        torch.testing.assert_close(chunked, reference)
