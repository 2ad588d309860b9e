"""What `accelerate launch` was asked for, and whether it is what happens."""

from __future__ import annotations

import os

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from recipes.common.errors import RecipeError

_ASKED = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED",
    "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM",
}
_SIZES = ("TP", "CP", "SP")


def sharding() -> str:
    """How the configuration of accelerate wants the model or its sequences in parts; empty where it does not."""
    found = [f"distributed_type: {name}" for name, variable in _ASKED.items() if parse_flag_from_env(variable)]
    sizes = {f"{name.lower()}_size": os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in _SIZES}
    return ", ".join([*found, *(f"{name}: {size}" for name, size in sizes.items() if size != "1")])


def check_launch(training: TrainingArguments) -> None:
    """Refuse a launch that would silently become another one.

    Raises:
        RecipeError: accelerate was asked for a model in parts, and runs plain data parallel: it shards on accelerators
            alone, and splits tensors of models alone that were loaded in parts.
    """
    asked = sharding()
    if asked and (training.device.type == "cpu" or "_size" in asked):
        raise RecipeError(
            f"accelerate was asked for {asked}, and would run plain data parallel here without a word: it shards on "
            "accelerators alone, and the recipes make their models whole. Launch with recipes/accelerate/ddp.yaml"
        )
