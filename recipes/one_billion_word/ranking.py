"""`python -m recipes.one_billion_word.ranking`: ways to train one network, by how often the right word is a best one.

Each method trains the same network from the same seed on the same batches, and is measured twice: after the same number
of steps, and after the same seconds of training (the measuring does not count): cross-entropy over all words, the
Z-loss, an adaptive softmax, a sampled softmax.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    HfArgumentParser,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import set_seed

from recipes.one_billion_word.callbacks import StepTimer
from recipes.one_billion_word.data import Data, prepare_data
from recipes.one_billion_word.errors import RecipeError
from recipes.one_billion_word.model import apply_loss, build_model, check_loss
from recipes.one_billion_word.options import ADAPTIVE, ModelOptions, parse_options
from recipes.one_billion_word.perplexity import measure_errors, measure_perplexity
from recipes.one_billion_word.plots import plot_errors
from recipes.one_billion_word.scoring import TOP, scorer_of

# Training ends when both budgets are spent, whatever the number of steps: so the learning rate stays as it is.
DEFAULTS = {
    "--preset": "ngram_small",
    "--max_steps": str(10**9),
    "--lr_scheduler_type": "constant_with_warmup",
    "--warmup_steps": "20",
    "--logging_strategy": "no",
    "--save_strategy": "no",
    "--disable_tqdm": "True",
    "--valid_sentences": "1000",
}


@dataclass
class RankingOptions:
    """What the comparison itself takes; every other option goes to all trainings."""

    output_dir: str = field(default="runs/ranking", metadata={"help": "Where table, plot and numbers are written."})
    methods: str = field(
        default="cce,zloss,adaptive,sampled",
        metadata={"help": "adaptive, sampled, stock, or any loss that xhead.patch knows; with commas."},
    )
    method_options: str = field(
        default="{}",
        metadata={"help": """JSON: for a method the options of its loss, as in '{"zloss": {"a": 0.1, "b": 10}}'."""},
    )
    steps: int = field(default=300, metadata={"help": "Measure every method after so many steps."})
    seconds: float = field(default=30.0, metadata={"help": "Measure every method after so many seconds of training."})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """The command: ranking.json, ranking.md and ranking.png. What the user got wrong ends it with status 2."""
    parser = HfArgumentParser(
        RankingOptions,  # pyright: ignore
        prog="python -m recipes.one_billion_word.ranking",
        description="Train one network in several ways and compare top-k errors at equal steps and at equal seconds.",
        allow_abbrev=False,
    )
    options, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    try:
        return compare(options, rest)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def compare(options: RankingOptions, rest: list[str]) -> dict[str, Any]:
    """Train every method and write the comparison.

    Raises:
        RecipeError: an option that cannot be used, before anything is trained.
    """
    folder = Path(options.output_dir)
    methods = [method.strip() for method in options.methods.split(",")]
    lines = {method: command_line(method, options, rest) for method in methods}
    parsed = {method: parse_options(line) for method, line in lines.items()}
    for _, model_options, _, _ in parsed.values():
        check_loss(model_options)
    if options.steps < 1 or options.seconds <= 0:
        raise RecipeError(f"--steps is {options.steps} and --seconds {options.seconds}: both must be above 0")
    data = prepare_data(parsed[methods[0]][0], folder / "data")
    report: dict[str, Any] = {
        "data": data.corpus.name,
        "vocabulary": len(data.vocabulary),
        "valid_tokens": data.valid.predicted,
        "steps": options.steps,
        "seconds": options.seconds,
        "methods": {},
    }
    print(f"{data.corpus.name}: {len(data.vocabulary):,} words, {data.valid.predicted:,} tokens to rank")
    for method, (_, model_options, _, training) in parsed.items():
        report["methods"][method] = train_method(data, model_options, training, options)
        at_end = report["methods"][method]["at_seconds"]
        print(f"{method:<14}{at_end['steps']:>8,} steps in {at_end['seconds']:.0f} s", flush=True)
    table = comparison(report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ranking.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "ranking.md").write_text(table)
    print(f"\n{table}\nwritten     ranking.json, ranking.md, ranking.png in {folder}")
    try:
        plot_errors(report, folder / "ranking.png")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return report


def command_line(method: str, options: RankingOptions, rest: list[str]) -> list[str]:
    """The options of one training. Raises RecipeError where `method_options` cannot be read or names another method."""
    try:
        given = json.loads(options.method_options)
    except json.JSONDecodeError as error:
        raise RecipeError(f"--method_options is {options.method_options!r}, which is not JSON: {error}") from error
    methods = [name.strip() for name in options.methods.split(",")]
    unknown = [name for name in given if name not in methods]
    if unknown:
        raise RecipeError(f"--method_options names {', '.join(unknown)}, but --methods are {', '.join(methods)}")
    defaults = [word for name, value in DEFAULTS.items() if name not in rest for word in (name, value)]
    chosen = ["--head", ADAPTIVE] if method == ADAPTIVE else ["--loss", method]
    if method in given:
        chosen += ["--loss_options", json.dumps(given[method])]
    return [*defaults, *rest, *chosen, "--output_dir", str(Path(options.output_dir) / method)]


class Budgets(StepTimer):
    """Measure when the steps are taken and when the seconds are spent, and end the training after both."""

    def __init__(self, steps: int, seconds: float, measure: Any) -> None:
        super().__init__()
        self.budget_steps, self.budget_seconds, self.measure = steps, seconds, measure
        self.found: dict[str, dict[str, Any]] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        spent = sum(self.seconds)
        reached = {"at_steps": state.global_step >= self.budget_steps, "at_seconds": spent >= self.budget_seconds}
        new = [name for name, there in reached.items() if there and name not in self.found]
        if new:
            measured = {"steps": state.global_step, "seconds": spent, **self.measure()}
            self.found |= dict.fromkeys(new, measured)
        control.should_training_stop = all(reached.values())


def train_method(
    data: Data, options: ModelOptions, training: TrainingArguments, budgets: RankingOptions
) -> dict[str, Any]:
    """Train one method until both budgets are spent: errors and perplexity at each."""
    model = build_model(options, data.vocabulary, data.train.block_length, training.seed)
    scorer = scorer_of(model, options)

    def measure() -> dict[str, Any]:
        size = training.per_device_eval_batch_size
        errors = measure_errors(model, data.valid, scorer, batch_size=size)
        perplexity = None
        if scorer.defines_probability:
            perplexity = measure_perplexity(model, data.valid, scorer=scorer, batch_size=size).perplexity
        return {"errors": {str(k): error for k, error in errors.items()}, "perplexity": perplexity}

    callback = Budgets(budgets.steps, budgets.seconds, measure)
    set_seed(training.seed)
    trainer = Trainer(
        model=apply_loss(model, options),
        args=training,
        train_dataset=data.train,
        data_collator=default_data_collator,
        callbacks=[callback],
    )
    trainer.train()
    return {"parameters": model.num_parameters(), "loss_options": options.parsed_loss_options, **callback.found}


def comparison(report: Mapping[str, Any]) -> str:
    """Two tables: errors in percent after the same steps, and after the same seconds."""
    lines = [f"{report['data']}, {report['vocabulary']:,} words, {report['valid_tokens']:,} tokens ranked", ""]
    for name, title in (
        ("at_steps", f"{report['steps']:,} steps each"),
        ("at_seconds", f"{report['seconds']:g} seconds of training each"),
    ):
        columns = [title, *(f"top-{k} error, %" for k in TOP), "perplexity", "steps", "seconds"]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for method, found in report["methods"].items():
            at = found[name]
            perplexity = "-" if at["perplexity"] is None or math.isinf(at["perplexity"]) else f"{at['perplexity']:.1f}"
            errors = [f"{100 * at['errors'][str(k)]:.1f}" for k in TOP]
            cells = [method, *errors, perplexity, f"{at['steps']:,}", f"{at['seconds']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
