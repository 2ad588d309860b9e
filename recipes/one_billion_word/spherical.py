"""Models with a factored spherical head (`xhead.heads.SphericalHead`) in the place of the linear projection.

The head takes plain SGD steps of its own, whatever the optimiser of the rest: `--head spherical`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from recipes.common.checkpoints import CheckpointedTrainer
from recipes.common.errors import RecipeError
from recipes.common.parts import Parts
from recipes.common.processes import is_sharded, is_split
from recipes.one_billion_word.ngram import NgramForCausalLM
from recipes.one_billion_word.options import SPHERICAL, ModelOptions
from recipes.one_billion_word.own_head import OwnHead
from xhead.heads import SphericalHead
from xhead.heads.label_shards import load_label_rows, save_label_rows
from xhead.trainer import AttachHead

RATE = 1.0
ROWS = "own_head"


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
    """Fail before any data is read when an option of the head is unknown or out of range, or the model is in parts.

    Raises:
        RecipeError: with what is allowed.
    """
    if options.head != SPHERICAL:
        return
    if is_sharded() or is_split():
        raise RecipeError(
            "--head spherical shares its rows over processes itself, and they have the rest of the model whole: launch "
            "with recipes/accelerate/ddp.yaml"
        )
    rate = options.parsed_head_options.get("learning_rate", RATE)
    if not isinstance(rate, (int, float)) or not rate > 0:
        raise RecipeError(f"--head_options has learning_rate {rate!r}; it must be a number above 0")
    try:
        SphericalHead(2, 4, **head_options(options))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"--head spherical --head_options {options.head_options}: {error}") from error


def is_shared(options: ModelOptions) -> bool:
    """Whether processes share a spherical head: each has some of its rows."""
    return options.head == SPHERICAL and PartialState().num_processes > 1


class SharedHeadParts(Parts):
    """A model whose spherical head is shared by the processes, and the whole of it."""

    @classmethod
    def of(cls, model: PreTrainedModel, options: ModelOptions) -> SharedHeadParts:
        """The head is shared in a copy of the model, which is to be trained."""
        trained = copy.deepcopy(model)
        projection = cast(SphericalOutput, model).own_head.to_linear()
        trained.own_head = SphericalOutput.make_head(
            projection, process_group=dist.group.WORLD, **head_options(options)
        )
        trained._keys_to_ignore_on_save = {name for name in trained.state_dict() if name.startswith("own_head.")}
        return cls(trained, model)

    def _gather(self) -> None:
        body = {name: each for name, each in self.trained.state_dict().items() if not name.startswith("own_head.")}
        self.whole.load_state_dict(body, strict=False)
        whole, shared = (cast(SphericalOutput, model).own_head for model in (self.whole, self.trained))
        _fill(whole, shared.dense())


def _fill(head: SphericalHead, rows: Tensor, **options: Any) -> None:
    """Set a head's W. rows: all, or this process's; options: `process_group`, where the head is shared."""
    filled = SphericalHead(head.in_features, head.out_features, head.loss, bias=head.bias, weight=rows, **options)
    head.load_state_dict(filled.state_dict())


class SharedHeadTrainer(CheckpointedTrainer):
    """Writes the rows of a shared head beside the rest of the model, each process its own; any number reads them."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        weight = cast(SphericalOutput, self.model).own_head.weight
        place = weight.place
        save_label_rows(Path(output_dir) / ROWS, {"rows": weight.own_rows()}, place.start, place.stop, place.classes)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        head = cast(SphericalOutput, self.model).own_head
        place = head.weight.place
        rows = load_label_rows(Path(resume_from_checkpoint) / ROWS, place.start, place.stop)["rows"]
        _fill(head, rows, process_group=dist.group.WORLD)


def head_callbacks(model: PreTrainedModel, options: ModelOptions, training: TrainingArguments) -> list[TrainerCallback]:
    """What makes the Trainer's optimiser update a spherical head; nothing for the other heads.

    The head's learning rate is that of `--head_options` at the peak of the schedule, and follows it.
    """
    if options.head != SPHERICAL:
        return []
    rate = options.parsed_head_options.get("learning_rate", RATE)
    return [AttachHead(model.own_head, rate_factor=rate / training.learning_rate)]  # pyright: ignore
