"""Models that processes keep in parts, and the whole of them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

import xhead
from recipes.common.errors import RecipeError
from recipes.common.processes import is_sharded, is_split
from xhead.replacement import has_replaced_head


@dataclass(frozen=True)
class Parts:
    """A model that trains, in parts where the launch asks for them, and one that is whole in every process.

    Without parts both are the same one.
    """

    trained: PreTrainedModel
    whole: PreTrainedModel

    @contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        """The whole model, with what training has reached. All processes call it together.

        Raises RuntimeError where the parts that the launch asked for were not made.
        """
        if self.trained is self.whole:
            yield self.whole
            return
        self._gather()
        try:
            yield self.whole.to(PartialState().device)  # pyright: ignore
        finally:
            self.whole.to("cpu")  # pyright: ignore

    def _gather(self) -> None:
        if not any(isinstance(parameter, DTensor) for parameter in self.trained.parameters()):
            raise RuntimeError("accelerate was asked for a model in parts, and has left it whole in every process")
        state = get_model_state_dict(self.trained, options=StateDictOptions(full_state_dict=True))
        self.whole.load_state_dict(state)


def in_parts(model: PreTrainedModel, folder: Path) -> Parts:
    """The parts of a model that the launch asks for. FSDP makes its own of the model that trains, in the Trainer.

    Args:
        model: whole, with the same weights in every process.
        folder: one that all processes see, where a model is written that is split as it is read.

    Raises:
        RecipeError: FSDP of an encoder and a decoder; tensor parallelism of a model whose layers transformers cannot
            split.
    """
    if is_sharded():
        if model.config.is_encoder_decoder:
            raise RecipeError(
                f"accelerate's FSDP cannot share out {type(model).__name__}, whose encoder and decoder have the same "
                "embeddings: launch with recipes/accelerate/ddp.yaml"
            )
        return Parts(copy.deepcopy(model), model)
    if not is_split():
        return Parts(model, model)
    if not model._tp_plan:
        raise RecipeError(
            f"transformers has no plan for splitting the layers of {type(model).__name__}: launch with fsdp2.yaml or "
            "ddp.yaml of recipes/accelerate"
        )
    state, path = PartialState(), folder / "unsplit"
    if state.is_main_process:
        model.save_pretrained(path)
    state.wait_for_everyone()
    load = partial(xhead.load, model_class=type(model)) if has_replaced_head(model) else type(model).from_pretrained
    split = load(path, distributed_config=DistributedConfig(tp_plan="auto"))
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(path)
    return Parts(split, model)
