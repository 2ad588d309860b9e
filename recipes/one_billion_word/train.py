"""Train a word-level transformer with the stock Trainer and measure its exact perplexity."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from recipes.one_billion_word.callbacks import ExactValidation, StepTimer
from recipes.one_billion_word.checkpoints import check_description, find_checkpoint, write_description
from recipes.one_billion_word.data import Data, prepare_data
from recipes.one_billion_word.errors import RecipeError
from recipes.one_billion_word.head_inputs import save_head_inputs
from recipes.one_billion_word.memory import measure_loss_memory, process_peak, reset_process_peak
from recipes.one_billion_word.model import apply_loss, build_model, check_loss
from recipes.one_billion_word.options import Options, parse_options
from recipes.one_billion_word.perplexity import measure_perplexity
from recipes.one_billion_word.plots import plot_losses


def main(arguments: list[str] | None = None) -> None:
    """The command: options in, results.json and losses.png out. What the user got wrong ends it with status 2."""
    try:
        run(*parse_options(arguments))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run(*options: Any, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train and measure.

    Args:
        options: the four that `parse_options` gives.
        callbacks: more for the Trainer.

    Returns:
        What is written to results.json in the output folder.

    Raises:
        RecipeError: data, vocabulary, loss or output folder cannot be used.
    """
    data_options, model_options, run_options, training = _as_options(options)
    state = PartialState()
    folder = Path(training.output_dir)
    check_loss(model_options)
    data = prepare_data(data_options, folder / "data")
    model = build_model(model_options, data.vocabulary, data_options.block_length, training.seed)
    description = {
        "data": data.fingerprint,
        "hidden_size": model_options.hidden_size,
        "layers": model_options.layers,
        "attention_heads": model_options.attention_heads,
        "tie_embeddings": model_options.tie_embeddings,
        "seed": training.seed,
    }
    check_description(folder, description, resume=run_options.resume)
    checkpoint = find_checkpoint(folder) if run_options.resume else None
    state.wait_for_everyone()
    if state.is_main_process:
        write_description(folder, description)
        data.vocabulary.write(folder / "vocabulary.txt")
    _describe(data, model, model_options.loss, checkpoint, run_options.resume)

    timer = StepTimer()
    trainer = Trainer(
        model=apply_loss(model, model_options),
        args=training,
        train_dataset=data.train,
        data_collator=default_data_collator,
        callbacks=[timer, *callbacks],
    )
    trainer.add_callback(ExactValidation(trainer, data.valid, run_options.valid_steps))
    peak_is_of_training = reset_process_peak()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    peak = process_peak()
    trainer.save_model(str(folder / "model"))

    results = _summary(data, model, model_options.loss, trainer, timer)
    results["process_peak_bytes"] = peak
    results["process_peak_is_of_training_alone"] = peak_is_of_training
    if run_options.evaluate_test:
        progress = None if training.disable_tqdm or not state.is_main_process else "testing"
        test = measure_perplexity(model, data.test, batch_size=training.per_device_eval_batch_size, progress=progress)
        results["test"] = {"loss": test.loss, "perplexity": test.perplexity, "tokens": test.tokens}
    if state.is_main_process:
        _after_training(results, data, model, trainer, run_options.save_head_inputs, run_options.measure_memory)
    state.wait_for_everyone()
    return results


def _as_options(options: Any) -> Options:
    data_options, model_options, run_options, training = options
    return data_options, model_options, run_options, training


def _describe(data: Data, model: PreTrainedModel, loss: str, checkpoint: Path | None, resume: bool) -> None:
    state = PartialState()
    state.print(f"data        {data.corpus.name}")
    state.print(f"test set    {data.corpus.test_name}: {data.test.predicted:,} tokens")
    state.print(
        f"vocabulary  {len(data.vocabulary):,} words; tokens to predict: {data.train.predicted:,} train, "
        f"{data.valid.predicted:,} valid"
    )
    state.print(f"model       {model.num_parameters():,} parameters, loss {loss}")
    if resume:
        state.print(f"resume      from {checkpoint or 'the beginning: no whole checkpoint was found'}")


def _summary(data: Data, model: PreTrainedModel, loss: str, trainer: Trainer, timer: StepTimer) -> dict[str, Any]:
    history = trainer.state.log_history
    train_losses = [entry["loss"] for entry in history if "loss" in entry]
    last = max(1, len(train_losses) // 10)
    valid = next((entry for entry in reversed(history) if "valid_loss" in entry), {})
    return {
        "data": data.corpus.name,
        "test_set": data.corpus.test_name,
        "vocabulary": len(data.vocabulary),
        "train_tokens": data.train.predicted,
        "parameters": model.num_parameters(),
        "loss": loss,
        "steps": trainer.state.global_step,
        "processes": PartialState().num_processes,
        "train_loss": statistics.fmean(train_losses[-last:]) if train_losses else None,
        "valid": {
            "loss": valid.get("valid_loss"),
            "perplexity": valid.get("valid_perplexity"),
            "tokens": data.valid.predicted,
        },
        "seconds_per_step_median": statistics.median(timer.seconds) if timer.seconds else None,
        "tokens_per_step": _tokens_per_step(trainer.args),
        "history": history,
    }


def _tokens_per_step(training: TrainingArguments) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def _after_training(
    results: dict[str, Any],
    data: Data,
    model: PreTrainedModel,
    trainer: Trainer,
    save_tokens: int,
    measure_memory: bool,
) -> None:
    folder = Path(str(trainer.args.output_dir))
    if measure_memory:
        device = next(model.parameters()).device
        blocks = [data.train[index] for index in range(min(trainer.args.per_device_train_batch_size, len(data.train)))]
        batch = {name: value.to(device) for name, value in default_data_collator(blocks).items()}  # pyright: ignore
        results["loss_memory_bytes"] = measure_loss_memory(model, batch, trainer.compute_loss_context_manager())
    if save_tokens:
        saved = save_head_inputs(model, data.valid, save_tokens, folder / "head_inputs.safetensors")
        print(f"saved       head inputs of {saved:,} validation tokens")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    valid = results["valid"]
    print(f"valid       loss {valid['loss']:.4f}, perplexity {valid['perplexity']:.2f} over {valid['tokens']:,} tokens")
    if "test" in results:
        test = results["test"]
        print(
            f"test        loss {test['loss']:.4f}, perplexity {test['perplexity']:.2f} over {test['tokens']:,} tokens"
        )
    try:
        plot_losses({results["loss"]: results["history"]}, folder / "losses.png", results["data"])
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    print(f"written     {folder}/results.json, losses.png, vocabulary.txt, model")
