"""What `accelerate launch` was asked for."""

from __future__ import annotations

import os

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from recipes.common.errors import RecipeError

_FSDP = "ACCELERATE_USE_FSDP"
_UNSERVED = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM"}
_SIZE = "PARALLELISM_CONFIG_{}_SIZE"


def is_sharded() -> bool:
    """Whether the launch asks for FSDP: each process keeps a part of every parameter, and has rows of its own."""
    return parse_flag_from_env(_FSDP)


def is_split() -> bool:
    """Whether the launch asks for tensor parallelism: each process computes a part of every layer, of the same rows."""
    return _size("TP") > 1


def _size(kind: str) -> int:
    return int(os.environ.get(_SIZE.format(kind), "1"))


def check_launch(*, served: bool = True) -> None:
    """Refuse a launch that would silently become another one.

    Args:
        served: whether FSDP and tensor parallelism are.

    Raises:
        RecipeError: accelerate was asked for something that the recipe does not do.
    """
    asked = [f"distributed_type: {name}" for name, variable in _UNSERVED.items() if parse_flag_from_env(variable)]
    if is_sharded() and os.environ.get("FSDP_VERSION", "1") != "2":
        asked.append("fsdp_version: 1")
    asked += [f"{kind.lower()}_size: {_size(kind)}" for kind in ("CP", "SP") if _size(kind) != 1]
    ours = (["distributed_type: FSDP"] if is_sharded() else []) + ([f"tp_size: {_size('TP')}"] if is_split() else [])
    if asked or len(ours) > served:
        known = "ddp.yaml, fsdp2.yaml or tensor_parallel.yaml" if served else "ddp.yaml"
        raise RecipeError(
            f"accelerate was asked for {' and '.join(asked + ours)}, which this recipe does not run: launch with "
            f"{known} of recipes/accelerate"
        )


def check_training(training: TrainingArguments, *, resume: bool) -> None:
    """Turn off checkpoints where there can be none.

    Raises:
        RecipeError: one is asked for.
    """
    if not is_split():
        return
    if resume:
        raise RecipeError(
            "--resume needs checkpoints, and transformers writes none of a model that is split over processes: launch "
            "with recipes/accelerate/fsdp2.yaml or ddp.yaml"
        )
    if training.save_strategy != "no":
        training.save_strategy = "no"
        PartialState().print("checkpoints none: transformers writes none of a model that is split over processes")


def data_processes(training: TrainingArguments) -> int:
    """How many processes have rows of their own."""
    return training.world_size // _size("TP")


def shard_on_cpu() -> None:
    """Have accelerate do on CPUs what it was asked for; it shards on accelerators alone, and says nothing elsewhere.

    To be called before an `Accelerator` is made.
    """
    state = PartialState()
    if (is_sharded() or is_split()) and state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def leave_processes() -> None:
    """End the group of processes, after the last has come here.

    gloo's threads, left running, now and then take a process down as it exits.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
