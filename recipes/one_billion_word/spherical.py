"""Models with a factored spherical head (`xhead.heads.SphericalHead`) in the place of the linear projection.

The head takes plain SGD steps of its own, whatever the optimiser of the rest: `--head spherical`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from recipes.common.errors import RecipeError
from recipes.common.processes import is_sharded, is_split
from recipes.one_billion_word.ngram import NgramForCausalLM
from recipes.one_billion_word.options import SPHERICAL, ModelOptions
from recipes.one_billion_word.own_head import OwnHead
from xhead.heads import SphericalHead
from xhead.trainer import AttachHead

RATE = 1.0


class SphericalOutput(OwnHead):
    """A spherical head gives loss and scores."""

    own_head: SphericalHead

    @staticmethod
    def make_head(projection: nn.Linear, **options: Any) -> SphericalHead:
        return SphericalHead.from_linear(projection, **options)

    def all_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.own_head(hidden)

    def loss_sum(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.own_head(hidden, target, reduction="sum")


class SphericalLlama(SphericalOutput, LlamaForCausalLM):
    """The transformer with a spherical head."""


class SphericalNgram(SphericalOutput, NgramForCausalLM):
    """The n-gram network with a spherical head."""


def head_options(options: ModelOptions) -> dict[str, Any]:
    """What `SphericalHead` takes of `--head_options`, all but its learning rate."""
    return {name: value for name, value in options.parsed_head_options.items() if name != "learning_rate"}


def check_spherical(options: ModelOptions) -> None:
    """Fail before any data is read when an option of the head is unknown or out of range, or in several processes.

    Raises:
        RecipeError: with what is allowed.
    """
    if options.head != SPHERICAL:
        return
    processes = PartialState().num_processes
    if processes > 1 or is_sharded() or is_split():
        raise RecipeError(f"--head spherical runs in one process, with a model that is not in parts; got {processes}")
    rate = options.parsed_head_options.get("learning_rate", RATE)
    if not isinstance(rate, (int, float)) or not rate > 0:
        raise RecipeError(f"--head_options has learning_rate {rate!r}; it must be a number above 0")
    try:
        SphericalHead(2, 4, **head_options(options))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"--head spherical --head_options {options.head_options}: {error}") from error


def head_callbacks(model: PreTrainedModel, options: ModelOptions, training: TrainingArguments) -> list[TrainerCallback]:
    """What makes the Trainer's optimiser update a spherical head; nothing for the other heads.

    The head's learning rate is that of `--head_options` at the peak of the schedule, and follows it.
    """
    if options.head != SPHERICAL:
        return []
    rate = options.parsed_head_options.get("learning_rate", RATE)
    return [AttachHead(model.own_head, rate_factor=rate / training.learning_rate)]  # pyright: ignore
