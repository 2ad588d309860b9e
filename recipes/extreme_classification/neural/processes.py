"""Training on several processes, as `accelerate launch` starts them, with the result of one.

Each process takes some documents of every batch, and holds some of the labels or all; the gradients of what all of
them hold are added up, so that they take the same step. Random masks of dropout differ from those of one process;
everything else is the same up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from recipes.common.processes import check_launch
from xhead.vocabulary import Vocabulary


def processes() -> PartialState:
    """The processes that train together, one where nothing started more; on a GPU where there is one.

    Raises:
        RecipeError: they were launched to split the model some other way.
    """
    check_launch(served=False)
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
    return PartialState(cpu=cpu)


def shared_labels(labels: int, state: PartialState, wanted: bool) -> Vocabulary | None:
    """Which labels this process holds; None where it holds all."""
    return Vocabulary.even(labels) if wanted and state.num_processes > 1 else None


def own_share(rows: Tensor, state: PartialState) -> tuple[Tensor, float]:
    """This process's part of a batch, and what it counts: 0 where a batch has fewer rows than there are processes.

    rows: (b,) -> (s,), at least one
    """
    mine = rows.tensor_split(state.num_processes)[state.process_index]
    return (mine, 1.0) if len(mine) else (rows[:1], 0.0)


def sum_over_processes(tensor: Tensor) -> None:
    """Add up the tensors of all processes, in place; nothing to do in a single one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes."""
    for parameter in parameters:
        if parameter.grad is not None:
            sum_over_processes(parameter.grad)


def of_main_process(value: float) -> float:
    """The value that the main process has."""
    return broadcast_object_list([value])[0]


def seed_apart(seed: int, state: PartialState) -> None:
    """Random numbers from here on that differ between processes; the main one has those of a single process."""
    if not state.is_main_process:
        torch.manual_seed(seed + state.process_index)
