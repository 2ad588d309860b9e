"""Train every head with every seed, forecast, and report."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

import xhead
from recipes.common.checkpoints import CheckpointedTrainer
from recipes.common.errors import RecipeError
from recipes.common.parts import in_parts
from recipes.common.processes import data_processes
from recipes.forecasting.options import DataOptions, ModelOptions, RunOptions, frequencies_of, parse_options
from recipes.forecasting.report import write_report
from recipes.forecasting.scores import forecast
from recipes.forecasting.series import load_series
from recipes.forecasting.windows import MISSING, TokenRows, ValueTokens, Windows, split
from xhead.replacement import has_replaced_head


def main(arguments: list[str] | None = None) -> None:
    """The command. What the user got wrong ends it with status 2."""
    try:
        run(*parse_options(arguments))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run(
    data_options: DataOptions, model_options: ModelOptions, run_options: RunOptions, training: TrainingArguments
) -> dict[str, Any]:
    """Train and compare.

    Returns:
        What is written to results.json in the output folder.

    Raises:
        RecipeError: data or heads cannot be used.
    """
    state = PartialState()
    series = load_series(data_options.data, data_options.made_series, data_options.made_length)
    tokens = ValueTokens(data_options.bins, data_options.low, data_options.high)
    context, horizon = data_options.context, data_options.horizon
    train, test = split(series, context, horizon, tokens, data_options.train_windows, data_options.test_windows)
    state.print(f"data        {series.source}: {len(series.values)} series, {len(train.tokens):,} windows to train on")
    shown = [field.name for field in dataclasses.fields(data_options) if field.name != "data"]
    about = {
        "data": series.source,
        "series": len(series.values),
        "train_windows": len(train.tokens),
        "test_windows": len(test.tokens),
        "data_options": {name: getattr(data_options, name) for name in shown},
        "model": dataclasses.asdict(model_options),
        "run": dataclasses.asdict(run_options),
        "steps": training.max_steps,
        "batch_size": training.per_device_train_batch_size * data_processes(training),
        "learning_rate": training.learning_rate,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    runs: dict[str, list[dict[str, float]]] = {head: [] for head in run_options.heads}
    paths = {}
    for seed in run_options.seeds:
        for head in run_options.heads:
            model = build_model(head, tokens, context + horizon, model_options, run_options, seed)
            parts = in_parts(model, Path(str(training.output_dir)))
            _train(parts.trained, train, training, seed)
            with parts.gathered():
                found = forecast(
                    model,
                    test,
                    tokens,
                    context,
                    data_options.season,
                    run_options.samples,
                    training.per_device_eval_batch_size,
                )
            scores = {**found.scores, "head_parameters": sum(each.numel() for each in model.lm_head.parameters())}
            line = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            state.print(f"seed {seed}  {head:<14}{line}", flush=True)
            runs[head].append(scores)
            paths.setdefault(head, found.paths)
    return write_report(runs, about, test, paths, context, Path(str(training.output_dir)))


def build_model(
    head: str, tokens: ValueTokens, length: int, options: ModelOptions, run_options: RunOptions, seed: int
) -> Any:
    """A Llama from scratch, with the head; the same seed gives the same first weights below it.

    Raises:
        RecipeError: more frequencies than the bins carry.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=tokens.vocabulary,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.attention_heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=MISSING,
    )
    model = LlamaForCausalLM(config)
    frequencies = frequencies_of(head)
    if frequencies is None:
        return model
    try:
        return xhead.patch(
            model,
            head="fourier",
            num_frequencies=frequencies,
            token_range=tokens.token_range,
            regularization=run_options.regularization,
            floor=run_options.floor,
            init_scale=run_options.init_scale,
            low=tokens.low,
            high=tokens.high,
        )
    except ValueError as error:
        raise RecipeError(f"--heads {head} with --bins {tokens.bins}: {error}") from error


def _train(model: Any, windows: Windows, training: TrainingArguments, seed: int) -> None:
    settings = dataclasses.replace(training, seed=seed, remove_unused_columns=False)
    if not has_replaced_head(model):
        xhead.patch(model)
    CheckpointedTrainer(model=model, args=settings, train_dataset=TokenRows(windows)).train()
