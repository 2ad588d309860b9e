"""Operands split between processes that share the classes, and the rule that statistics of them must meet."""

import torch

import xhead
from tests.dense import relative_error
from tests.statistic_case import NAMES, Case
from xhead.statistics import row_statistics

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5}

# Edges of the shards: even, uneven, with empty ones, and in another order than the ranks.
EDGES = {
    2: [[(0, 60), (60, 121)], [(0, 7), (7, 121)], [(0, 0), (0, 121)], [(100, 121), (0, 100)]],
    4: [[(0, 31), (31, 62), (62, 93), (93, 121)], [(0, 1), (1, 1), (100, 121), (1, 100)]],
}
CLASSES = 121

ASKED = [
    (("lse", "target"), {}),
    (NAMES, {}),
    (NAMES, {"softcap": 3.0, "scale": 0.7}),
    (("mean", "variance", "argmax"), {"mean_weight": True}),
    (("lse", "mean", "target"), {"mean_weight": True, "row_mask": True}),
    (("variance",), {}),
    (("entropy",), {"row_mask": True}),
    (("expectation", "max"), {}),
    (("pointwise_sum", "column_logits"), {"pointwise": "softplus", "row_mask": True}),
    (("complement_lse", "column_logits"), {"softcap": 3.0}),
    (("target", "lse"), {"soft": True}),
]


def close(found, expected, dtype, what):
    assert found.shape == expected.shape, what
    assert relative_error(found, expected, 1e-3) <= ALLOWED[dtype], (what, relative_error(found, expected, 1e-3))


def split(vocabulary, hidden, weight, bias):
    """The process's own leaves, of leaves that are whole."""
    own = vocabulary.own
    shards = (hidden, weight[own], None if bias is None else bias[own])
    return [None if each is None else each.detach().clone().requires_grad_() for each in shards]


def close_gradients(vocabulary, leaves, whole, dtype, what):
    hidden, weight, bias = (None if each is None else each.grad for each in whole)
    expected = (hidden, weight[vocabulary.own], None if bias is None else bias[vocabulary.own])
    for name, leaf, gradient in zip(("hidden", "weight", "bias"), leaves, expected, strict=True):
        if leaf is not None:
            close(leaf.grad, gradient, dtype, f"{what}: gradient of {name}")


def check_statistics(vocabulary, dtype):
    case = Case(classes=CLASSES, rows=9, size=7, dtype=dtype, peak=2.0)
    case.columns[0] = -1  # a row without columns
    case.columns[1] = torch.arange(5)  # all columns on one process, for most edges
    mask = torch.arange(9) % 4 != 2
    generator = torch.Generator().manual_seed(1)
    upstream = {**case.upstream, "pointwise_sum": torch.randn(9, generator=generator, dtype=torch.float64)}
    for names, asked in ASKED:
        options = {key: value for key, value in asked.items() if key not in ("mean_weight", "row_mask", "soft")}
        options.update(case.arguments(names))
        if "column_logits" in names or "complement_lse" in names:
            options["columns"] = case.columns
        if "mean_weight" in asked:
            options["mean_weight"] = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2))
            options["mean_weight"][:10] = 0  # the whole of one shard
        if "row_mask" in asked:
            options["row_mask"] = mask
        if "soft" in asked:
            options["target"] = torch.rand(9, CLASSES, generator=torch.Generator().manual_seed(3), dtype=dtype)
        own = split(vocabulary, *case.inputs)
        whole = [each.detach().clone().requires_grad_() for each in case.inputs]
        expected = row_statistics(whole[0], whole[1], names, bias=whole[2], filter_eps=None, **options)
        entered = vocabulary.enter(own[0])
        found = row_statistics(entered, own[1], names, bias=own[2], filter_eps=None, vocabulary=vocabulary, **options)
        totals = []
        for statistics in (expected, found):
            total = 0.0
            for name in names:
                value = getattr(statistics, name)
                if name in ("max", "argmax"):
                    continue
                if name == "column_logits":
                    factor = torch.randn(value.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
                else:
                    factor = upstream[name]
                total = total + torch.where(value.isfinite(), value.double() * factor, 0.0).sum()
            totals.append(total)
        for name in names:
            ours, theirs = getattr(found, name), getattr(expected, name)
            if name == "argmax":
                assert torch.equal(ours, theirs), (names, asked)
                continue
            finite = theirs.isfinite()
            assert torch.equal(ours.isfinite(), finite), (name, asked)
            close(ours[finite], theirs[finite], dtype, (name, asked, vocabulary))
        for total in totals:
            total.backward()
        close_gradients(vocabulary, own, whole, dtype, (names, asked, vocabulary))


def check_cross_entropy(vocabulary, dtype):
    case = Case(classes=CLASSES, rows=12, size=7, dtype=dtype, peak=3.0)
    first = vocabulary.ranges[-1][0]
    targets = {"anywhere": case.target, "on one rank": torch.full_like(case.target, first)}
    targets["ignored"] = torch.full_like(case.target, -100)
    targets["some ignored"] = torch.where(torch.arange(12) % 3 == 0, -100, case.target)
    targets["soft"] = torch.rand(12, CLASSES, generator=torch.Generator().manual_seed(3), dtype=dtype)
    class_weight = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2), dtype=dtype)
    for what, target in targets.items():
        for options in (
            {},
            {"label_smoothing": 0.1, "class_weight": class_weight, "softcap": 5.0, "lse_penalty": 0.01},
            {"reduction": "none", "filter_eps": None},
        ):
            if what == "ignored" and "reduction" not in options:
                continue  # 0 / 0, as in PyTorch
            own, whole = (
                split(vocabulary, *case.inputs),
                [each.detach().clone().requires_grad_() for each in case.inputs],
            )
            common = {"return_lse": True, "return_accuracy": what != "ignored", **options}
            expected = xhead.linear_cross_entropy(whole[0], whole[1], target, bias=whole[2], **common)
            found = xhead.linear_cross_entropy(own[0], own[1], target, bias=own[2], vocabulary=vocabulary, **common)
            for ours, theirs in zip(found, expected, strict=True):
                close(ours, theirs, dtype, (what, options))
            for loss in (expected, found):
                (loss[0].sum() + 0.3 * loss[1].sum()).backward()
            close_gradients(vocabulary, own, whole, dtype, (what, options))
