"""`python -m recipes.one_billion_word.ranking`: ways to train one network, by how often the right word is a best one.

Each method trains the same network from the same seed on the same batches, and is measured twice: after the same number
of steps, and after the same seconds of training (the measuring does not count): stock cross-entropy over all words and
the cut one, the Z-loss of a plain weight and of the factored head, an adaptive softmax, a sampled softmax.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

from recipes.common.command_line import json_object
from recipes.common.errors import RecipeError
from recipes.one_billion_word.callbacks import now
from recipes.one_billion_word.data import Data, prepare_data
from recipes.one_billion_word.model import apply_loss, build_model, check_loss, count_parameters
from recipes.one_billion_word.options import ADAPTIVE, SPHERICAL, ModelOptions, parse_options, preset_of
from recipes.one_billion_word.perplexity import measure_errors, measure_perplexity
from recipes.one_billion_word.plots import plot_errors
from recipes.one_billion_word.scoring import TOP, scorer_of
from recipes.one_billion_word.spherical import check_spherical, head_callbacks

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
# For a preset, what each method trains with where nothing else is given. Chosen by the top-10 error on validation text
# of WikiText-2 after equal seconds of a CPU, a few values each; those of the adaptive and sampled softmax were not.
TUNED = {
    "ngram_small": {
        "stock": ["--learning_rate", "5e-3"],
        "cce": ["--learning_rate", "5e-3"],
        "zloss": ["--learning_rate", "1.5e-3", "--loss_options", '{"a": 0.2, "b": 15}'],
        "spherical": [
            "--learning_rate", "3e-3",
            "--head_options", '{"sharpness": 0.1, "margin": 10, "learning_rate": 30}',
        ],
        "adaptive": ["--learning_rate", "3e-3"],
        "sampled": ["--learning_rate", "3e-3"],
    }
}  # fmt: skip

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"


@dataclass
class RankingOptions:
    """What the comparison itself takes; every other option goes to all trainings."""

    output_dir: str = field(default="runs/ranking", metadata={"help": "Where table, plot and numbers are written."})
    methods: str = field(
        default="stock,cce,zloss,spherical,adaptive,sampled",
        metadata={"help": "adaptive, sampled, spherical, stock, or any loss that xhead.patch knows; with commas."},
    )
    method_options: str = field(
        default="{}",
        metadata={
            "help": """JSON: for a method the options of its loss or head, as in '{"zloss": {"a": 0.1, "b": 10}}'."""
        },
    )
    training_options: str = field(
        default="{}",
        metadata={"help": """JSON: for a method options of its training, as in '{"cce": {"learning_rate": 0.003}}'."""},
    )
    split: str = field(default="valid", metadata={"help": "The text that is ranked: valid or test."})
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
        check_spherical(model_options)
    if options.split not in ("valid", "test"):
        raise RecipeError(f"--split is {options.split!r}; known: valid, test")
    if options.steps < 1 or options.seconds <= 0:
        raise RecipeError(f"--steps is {options.steps} and --seconds {options.seconds}: both must be above 0")
    data = prepare_data(parsed[methods[0]][0], folder / "data")
    report: dict[str, Any] = {
        "data": data.corpus.name,
        "vocabulary": len(data.vocabulary),
        "split": options.split,
        "tokens": {"valid": data.valid, "test": data.test}[options.split].predicted,
        "steps": options.steps,
        "seconds": options.seconds,
        "methods": {},
    }
    print(f"{data.corpus.name}: {len(data.vocabulary):,} words, {report['tokens']:,} {options.split} tokens to rank")
    for method, (_, model_options, _, training) in parsed.items():
        report["methods"][method] = train_method(method, data, model_options, training, options)
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
    """The options of one training. Raises RecipeError where options cannot be read or are of another method."""
    given, training = (_of_methods(name, options) for name in ("method_options", "training_options"))
    defaults = [word for name, value in DEFAULTS.items() if name not in rest for word in (name, value)]
    tuned = TUNED.get(preset_of([*defaults, *rest]), {}).get(method, [])
    trained = [word for name, value in training.get(method, {}).items() for word in (f"--{name}", str(value))]
    chosen = ["--head", method] if method in (ADAPTIVE, SPHERICAL) else ["--loss", method]
    if method in given:
        chosen += ["--head_options" if method == SPHERICAL else "--loss_options", json.dumps(given[method])]
    return [*defaults, *tuned, *rest, *trained, *chosen, "--output_dir", str(Path(options.output_dir) / method)]


def _of_methods(name: str, options: RankingOptions) -> dict[str, dict[str, Any]]:
    given = json_object(f"--{name}", getattr(options, name))
    if not all(isinstance(each, dict) for each in given.values()):
        raise RecipeError(f"--{name} is {getattr(options, name)!r}; it must be a JSON object of objects, one a method")
    methods = [each.strip() for each in options.methods.split(",")]
    unknown = [method for method in given if method not in methods]
    if unknown:
        raise RecipeError(f"--{name} names {', '.join(unknown)}, but --methods are {', '.join(methods)}")
    return given


class Budgets(TrainerCallback):
    """Measure when the steps are taken and when the seconds are spent, and end the training after both.

    The seconds are those since training began, without the ones that measuring took.
    """

    def __init__(self, title: str, steps: int, seconds: float, measure: Callable[[], dict[str, Any]]) -> None:
        self.steps, self.seconds, self.measure = steps, seconds, measure
        self.found: dict[str, dict[str, Any]] = {}
        self.bar = tqdm(desc=title, total=100, unit="%", leave=False, disable=None, bar_format=BAR)
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        spent = now() - self._began
        reached = {"at_steps": state.global_step >= self.steps, "at_seconds": spent >= self.seconds}
        new = [name for name, there in reached.items() if there and name not in self.found]
        if new:
            measured = {"steps": state.global_step, "seconds": spent, **self.measure()}
            self.found |= dict.fromkeys(new, measured)
            self._began = now() - spent
        self.bar.update(int(100 * min(1, state.global_step / self.steps, spent / self.seconds)) - self.bar.n)
        control.should_training_stop = all(reached.values())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


def train_method(
    method: str, data: Data, options: ModelOptions, training: TrainingArguments, budgets: RankingOptions
) -> dict[str, Any]:
    """Train one method until both budgets are spent: errors and perplexity at each."""
    model = build_model(options, data.vocabulary, data.train.block_length, training.seed)
    scorer = scorer_of(model, options)
    blocks = {"valid": data.valid, "test": data.test}[budgets.split]

    def measure() -> dict[str, Any]:
        size = training.per_device_eval_batch_size
        errors = measure_errors(model, blocks, scorer, batch_size=size)
        perplexity = None
        if scorer.defines_probability:
            perplexity = measure_perplexity(model, blocks, scorer=scorer, batch_size=size).perplexity
        return {"errors": {str(k): error for k, error in errors.items()}, "perplexity": perplexity}

    callback = Budgets(method, budgets.steps, budgets.seconds, measure)
    set_seed(training.seed)
    trainer = Trainer(
        model=apply_loss(model, options),
        args=training,
        train_dataset=data.train,
        data_collator=default_data_collator,
        callbacks=[*head_callbacks(model, options, training), callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {
        "parameters": count_parameters(model),
        "loss_options": options.parsed_loss_options,
        "head_options": options.parsed_head_options,
        "learning_rate": training.learning_rate,
        **callback.found,
    }


def comparison(report: Mapping[str, Any]) -> str:
    """Two tables: errors in percent after the same steps, and after the same seconds."""
    lines = [
        f"{report['data']}, {report['vocabulary']:,} words, {report['tokens']:,} {report['split']} tokens ranked",
        "",
    ]
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
