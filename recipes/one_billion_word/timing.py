"""Seconds of a training step, of several models in turn.

Two trainings run one after the other meet a different machine each: other work comes and goes, clocks change. Where
they take turns step by step, whatever disturbs one disturbs the others, and the ratio of the medians holds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from recipes.one_billion_word.packing import IGNORED


def seconds_per_step(
    models: Mapping[str, PreTrainedModel],
    batches: Sequence[dict[str, torch.Tensor]],  # each (B, L)
    training: TrainingArguments,
) -> dict[str, float]:
    """Median seconds of forward, backward, clipping and AdamW.

    Args:
        models: by name; each takes one step on each batch, and changes by it.
        batches: as training gives them; the first two are not counted.
        training: device, precision, learning rate and clipping.
    """
    optimizers = {}
    for name, model in models.items():
        model.to(training.device).train()  # pyright: ignore
        optimizers[name] = torch.optim.AdamW(model.parameters(), lr=training.learning_rate)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number, batch in enumerate(batches):
        on_device = {name: value.to(training.device) for name, value in batch.items()}
        for name in sorted(models, reverse=bool(number % 2)):  # neither is always the one that goes first
            began = _now(training.device)
            _step(models[name], optimizers[name], on_device, training)
            seconds[name].append(_now(training.device) - began)
    return {name: statistics.median(values[2:] or values) for name, values in seconds.items()}


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],  # each (B, L)
    training: TrainingArguments,
) -> None:
    counted = (batch["labels"][:, 1:] != IGNORED).sum()
    with _autocast(training):
        loss = model(**batch, num_items_in_batch=counted).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _autocast(training: TrainingArguments) -> AbstractContextManager[Any]:
    if not (training.bf16 or training.fp16):
        return nullcontext()
    return torch.autocast(training.device.type, dtype=torch.bfloat16 if training.bf16 else torch.float16)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
