"""The rows that count and the classifier, as Triton's kernels take them."""

import importlib
from typing import Any

from torch import Tensor

from xhead.engines.problem import Problem
from xhead.engines.tiles import Rows


def kernels(name: str) -> Any:
    """A module of the kernels, which need triton, imported when it is first used."""
    return importlib.import_module(f"xhead_kernels.{name}")


def blocks_for(problem: Problem) -> Any:
    """The sizes of the tiles, known from the problem alone."""
    hidden = problem.hidden
    return kernels("blocks").blocks_for(hidden.dtype, hidden.device, capped=problem.softcap is not None)


class Operands:
    """Hidden states and targets of the rows that count (n of them), the weight and the bias, with rows in one piece."""

    def __init__(self, problem: Problem):
        self.rows = Rows(problem)
        hidden = self.rows.take(problem.hidden)
        self.hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        self.weight = problem.weight if problem.weight.stride(-1) == 1 else problem.weight.contiguous()
        self.bias = None if problem.bias is None else problem.bias.contiguous()
        self.target: Tensor | None = None
        if problem.target is not None and not problem.soft_target:
            self.target = self.rows.take(problem.target).contiguous()
        self.blocks = blocks_for(problem)
        self.options = {"scale": problem.scale, "softcap": problem.softcap}
