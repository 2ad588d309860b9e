"""Train a word-level model with the stock Trainer, and measure its exact perplexity and ranking errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from recipes.common.checkpoints import (
    CheckpointedTrainer,
    check_description,
    find_checkpoint,
    write_description,
    written_aside,
)
from recipes.common.errors import RecipeError
from recipes.common.parts import in_parts
from recipes.common.processes import is_sharded, is_split
from recipes.one_billion_word.callbacks import ExactValidation, StepTimer
from recipes.one_billion_word.data import Data, prepare_data
from recipes.one_billion_word.head_inputs import save_head_inputs
from recipes.one_billion_word.memory import measure_loss_memory, process_peak, reset_process_peak
from recipes.one_billion_word.model import apply_loss, build_model, check_loss
from recipes.one_billion_word.options import LINEAR, DataOptions, ModelOptions, RunOptions, parse_options
from recipes.one_billion_word.packing import PackedSentences
from recipes.one_billion_word.perplexity import measure_errors, measure_perplexity
from recipes.one_billion_word.report import describe, summarize, write_report
from recipes.one_billion_word.scoring import Scorer, scorer_of
from recipes.one_billion_word.spherical import (
    SharedHeadParts,
    SharedHeadTrainer,
    check_spherical,
    head_callbacks,
    is_shared,
)
from recipes.one_billion_word.start import load_start
from recipes.one_billion_word.vq import apply_vq, check_vq, head_facts
from xhead import roll_call


def main(arguments: list[str] | None = None) -> None:
    """The command: options in, results.json and losses.png out. What the user got wrong ends it with status 2."""
    try:
        run(*parse_options(arguments))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run(
    data_options: DataOptions,
    model_options: ModelOptions,
    run_options: RunOptions,
    training: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train and measure.

    Args:
        data_options, model_options, run_options, training: what `parse_options` gives.
        callbacks: more for the Trainer.

    Returns:
        What is written to results.json in the output folder.

    Raises:
        RecipeError: data, vocabulary, loss or output folder cannot be used.
    """
    state = PartialState()
    folder = Path(str(training.output_dir))
    check_loss(model_options)
    check_vq(model_options)
    check_spherical(model_options)
    if model_options.head != LINEAR and (run_options.measure_memory or run_options.save_head_inputs):
        raise RecipeError(
            f"--measure_memory and --save_head_inputs need a linear head, got --head {model_options.head}"
        )
    if run_options.measure_memory and (is_sharded() or is_split()):
        raise RecipeError("--measure_memory needs a whole model: launch with recipes/accelerate/ddp.yaml")
    data = prepare_data(data_options, folder / "data")
    model = build_model(model_options, data.vocabulary, data_options.block_length, training.seed)
    load_start(model, model_options, data.vocabulary)
    description = {
        "data": data.fingerprint,
        "hidden_size": model_options.hidden_size,
        "layers": model_options.layers,
        "attention_heads": model_options.attention_heads,
        "tie_embeddings": model_options.tie_embeddings,
        "network": model_options.network,
        "head": model_options.head,
        "head_options": model_options.parsed_head_options,
        "start_from": model_options.start_from,
        "seed": training.seed,
        "sharded": is_sharded(),
        "head_shared": is_shared(model_options),
    }
    check_description(folder, description, resume=run_options.resume)
    checkpoint = find_checkpoint(folder) if run_options.resume else None
    state.wait_for_everyone()
    if state.is_main_process:
        write_description(folder, description)
        with written_aside(folder / "vocabulary.txt") as path:
            data.vocabulary.write(path)
    apply_vq(model, model_options, data.vocabulary)
    describe(data, model, model_options)
    if run_options.resume:
        state.print(f"resume      from {checkpoint or 'the beginning: no whole checkpoint was found'}")

    timer = StepTimer()
    shared = is_shared(model_options)
    parts = SharedHeadParts.of(model, model_options) if shared else in_parts(model, folder)
    trainer_class = SharedHeadTrainer if shared else CheckpointedTrainer
    trainer = trainer_class(
        model=apply_loss(parts.trained, model_options),
        args=training,
        train_dataset=data.train,
        data_collator=default_data_collator,
        callbacks=[timer, *head_callbacks(parts.trained, model_options, training), *callbacks],
    )
    scorer = scorer_of(model, model_options)
    trainer.add_callback(ExactValidation(trainer, parts, scorer, data.valid, run_options.valid_steps))
    peak_is_of_training = reset_process_peak()
    with roll_call():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    peak = process_peak()

    results = summarize(data, parts, model_options, trainer, timer.seconds)
    results["process_peak_bytes"] = peak
    results["process_peak_is_of_training_alone"] = peak_is_of_training
    with parts.gathered():
        results["output_head"] = head_facts(model, model_options, data.vocabulary)
        _measure(model, data, scorer, results, run_options, training)
        if state.is_main_process:
            model.save_pretrained(folder / "model")
            if run_options.measure_memory:
                results["loss_memory_bytes"] = _loss_memory(model, data.train, trainer)
            if run_options.save_head_inputs:
                path = folder / "head_inputs.safetensors"
                saved = save_head_inputs(model, data.valid, run_options.save_head_inputs, path)
                print(f"saved       what the head gets for {saved:,} validation tokens in {path}")
    if state.is_main_process:
        write_report(results, folder)
    state.wait_for_everyone()
    return results


def _measure(
    model: PreTrainedModel,
    data: Data,
    scorer: Scorer,
    results: dict[str, Any],
    options: RunOptions,
    training: TrainingArguments,
) -> None:
    """Ranking errors on the validation set and the test set's perplexity, into `results`."""
    quiet = training.disable_tqdm or not PartialState().is_main_process
    size = training.per_device_eval_batch_size
    errors = measure_errors(model, data.valid, scorer, batch_size=size, progress=None if quiet else "ranking")
    results["valid"]["top_k_errors"] = {str(k): error for k, error in errors.items()}
    if options.evaluate_test and scorer.defines_probability:
        progress = None if quiet else "testing"
        test = measure_perplexity(model, data.test, scorer=scorer, batch_size=size, progress=progress)
        results["test"] = {"loss": test.loss, "perplexity": test.perplexity, "tokens": test.tokens}


def _loss_memory(model: PreTrainedModel, blocks: PackedSentences, trainer: Trainer) -> dict[str, int]:
    size = min(trainer.args.per_device_train_batch_size, len(blocks))
    batch = default_data_collator([blocks[index] for index in range(size)])  # pyright: ignore
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    return measure_loss_memory(model, batch, trainer.compute_loss_context_manager())
