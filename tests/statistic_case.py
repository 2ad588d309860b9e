"""Random inputs for the row statistics, and the rule that their values and gradients must meet."""

import torch

from tests.dense import dense_logits, dense_statistic, relative_error
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
