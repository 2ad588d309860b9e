"""What the recipe adds to the stock Trainer: exact validation, and the time of each step."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.common.parts import Parts
from recipes.one_billion_word.packing import PackedSentences
from recipes.one_billion_word.perplexity import measure_errors, measure_perplexity
from recipes.one_billion_word.scoring import Scorer


class ExactValidation(TrainerCallback):
    """Log `valid_loss` and `valid_perplexity` every so many steps and after the last; for a head that defines no
    probability `valid_top_1_error` and so on.

    The Trainer's own evaluation averages the means of batches, which weighs a token of a batch with few tokens more.
    """

    def __init__(self, trainer: Trainer, parts: Parts, scorer: Scorer, blocks: PackedSentences, every: int) -> None:
        self.trainer = trainer
        self.parts = parts
        self.scorer = scorer
        self.blocks = blocks
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        how: dict[str, Any] = {
            "batch_size": args.per_device_eval_batch_size,
            "progress": None if args.disable_tqdm or not state.is_local_process_zero else "validating",
        }
        with self.parts.gathered() as model:
            if self.scorer.defines_probability:
                measured = measure_perplexity(model, self.blocks, scorer=self.scorer, **how)
                entry = {"valid_loss": measured.loss, "valid_perplexity": measured.perplexity}
            else:
                errors = measure_errors(model, self.blocks, self.scorer, **how)
                entry = {f"valid_top_{k}_error": error for k, error in errors.items()}
        should_log = control.should_log
        self.trainer.log(entry)
        control.should_log = should_log  # logging clears it, and the training loss of this step is logged next


class StepTimer(TrainerCallback):
    """Seconds of each step, forward to optimizer, without the loading of data and whatever happens between steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(now() - self._started)


def now() -> float:
    """Seconds on a clock, when all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
