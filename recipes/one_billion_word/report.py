"""What a run tells: lines at its start and end, results.json, losses.png."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, Trainer

import xhead
from recipes.common.parts import Parts
from recipes.common.processes import data_processes
from recipes.one_billion_word.data import Data
from recipes.one_billion_word.model import count_parameters
from recipes.one_billion_word.options import LINEAR, STOCK, ModelOptions
from recipes.one_billion_word.plots import plot_losses


def describe(data: Data, model: PreTrainedModel, options: ModelOptions) -> None:
    """Say which data, which test set, which vocabulary and which model: on the first process only."""
    state = PartialState()
    state.print(f"data        {data.corpus.name}")
    state.print(f"test set    {data.corpus.test_name}: {data.test.predicted:,} tokens")
    state.print(
        f"vocabulary  {len(data.vocabulary):,} words; tokens to predict: {data.train.predicted:,} train, "
        f"{data.valid.predicted:,} valid"
    )
    loss = f"loss {options.loss}" if options.head == LINEAR else "with its own loss"
    state.print(
        f"model       {options.network}, {count_parameters(model):,} parameters, {options.head} head, {loss}, "
        f"processes {state.num_processes}"
    )


def summarize(
    data: Data, parts: Parts, options: ModelOptions, trainer: Trainer, seconds: list[float]
) -> dict[str, Any]:
    """The results of a training.

    Args:
        data: what was trained on.
        parts: what was trained.
        options: its head and its loss.
        trainer: after training.
        seconds: of each step.
    """
    history = trainer.state.log_history
    train_losses = [entry["loss"] for entry in history if "loss" in entry]
    if not train_losses:  # fewer steps than --logging_steps: the Trainer's own mean over all of them
        train_losses = [entry["train_loss"] for entry in history if "train_loss" in entry]
    last = max(1, len(train_losses) // 10)
    valid = next((entry for entry in reversed(history) if "valid_loss" in entry), {})
    training = trainer.args
    blocks = training.train_batch_size * training.gradient_accumulation_steps * data_processes(training)
    results: dict[str, Any] = {
        "data": data.corpus.name,
        "test_set": data.corpus.test_name,
        "vocabulary": len(data.vocabulary),
        "train_tokens": data.train.predicted,
        "parameters": count_parameters(parts.whole),
        "head": options.head,
        "loss": options.loss,
        "steps": trainer.state.global_step,
        "tokens_per_step": blocks * data.train.block_length,
        "processes": training.world_size,
        "train_loss": statistics.fmean(train_losses[-last:]) if train_losses else None,
        "valid": {
            "loss": valid.get("valid_loss"),
            "perplexity": valid.get("valid_perplexity"),
            "tokens": data.valid.predicted,
        },
        "seconds_per_step_median": statistics.median(seconds) if seconds else None,
        "history": history,
    }
    if options.loss != STOCK:
        status = xhead.status(parts.trained)
        results["patch"] = {"cut": status.cut, "materialized": status.materialized}
    return results


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Print the perplexities and the ranking errors, and write results.json and losses.png."""
    errors = results["valid"].get("top_k_errors", {})
    if errors:
        print("valid       error " + ", ".join(f"top-{k} {error:.2%}" for k, error in errors.items()))
    for split in ("valid", "test"):
        if split in results and results[split]["loss"] is not None:
            loss, perplexity, tokens = (results[split][name] for name in ("loss", "perplexity", "tokens"))
            print(f"{split:<12}loss {loss:.4f}, perplexity {perplexity:.2f} over {tokens:,} tokens")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    written = "results.json, losses.png"
    try:
        plot_losses({results["loss"]: results["history"]}, folder / "losses.png", results["data"])
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        written = "results.json"
    print(f"written     {written}, vocabulary.txt and model in {folder}")
