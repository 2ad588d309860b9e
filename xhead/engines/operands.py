"""The rows that count and the classifier, as Triton's kernels take them."""

import functools
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
    """Hidden states and targets of the rows that count (n of them), the weight and the bias, with rows in one piece.

    `source` has all rows, and `row_index` (n,) says where those that count lie in it; None where all do.
    """

    def __init__(self, problem: Problem):
        self.rows = Rows(problem)
        self.source = problem.hidden if problem.hidden.stride(-1) == 1 else problem.hidden.contiguous()
        self.row_index = None if self.rows.index is None else self.rows.index.int()
        self.weight = problem.weight if problem.weight.stride(-1) == 1 else problem.weight.contiguous()
        self.bias = None if problem.bias is None else problem.bias.contiguous()
        self.target: Tensor | None = None
        if problem.target is not None and not problem.soft_target:
            self.target = self.rows.take(problem.target).contiguous()
        self.blocks = blocks_for(problem)
        self.options = {"scale": problem.scale, "softcap": problem.softcap}

    @functools.cached_property
    def hidden(self) -> Tensor:
        """(n, D), a copy where some rows do not count."""
        return self.rows.take(self.source)

    def hidden_of(self, row: slice | Tensor) -> Tensor:
        """Hidden states of some of the rows that count; a copy of them alone."""
        return self.source[row if self.row_index is None else self.row_index[row]]
