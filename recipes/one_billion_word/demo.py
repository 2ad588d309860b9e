"""Train the stock model and the patched one from one seed, and print side by side what each cost.

Each trains in a process of its own, so that the memory of one is not counted for the other. The seconds of a step are
measured afterwards on the two trained models in turn, so that neither has the machine in a better moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, LlamaForCausalLM, default_data_collator

from recipes.common.errors import RecipeError
from recipes.one_billion_word.data import prepare_data
from recipes.one_billion_word.model import apply_loss, check_loss
from recipes.one_billion_word.options import STOCK, parse_options
from recipes.one_billion_word.plots import plot_losses
from recipes.one_billion_word.timing import seconds_per_step

TOLERANCE = 1e-3  # nats a token: what two runs may differ by that compute the same loss in another order
TIMED_STEPS = 17

# A head of 12,800 words on a width of 256 takes 70 % of a step on a CPU, about the share it has in a small language
# model on a GPU. 100 steps of 2,048 tokens take one to two minutes on two cores.
DEFAULTS = {
    "--min_count": "1",
    "--max_steps": "100",
    "--warmup_steps": "15",
    "--learning_rate": "2e-3",
    "--logging_steps": "5",
    "--valid_steps": "50",
    "--save_strategy": "no",
    "--evaluate_test": "False",
    "--measure_memory": "True",
}


@dataclass
class DemoOptions:
    """What the demo itself takes; every other option goes to both trainings."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Where tables, plots and models are written."})
    loss: str = field(default="cce", metadata={"help": "The loss of the patched model."})


def main(arguments: list[str] | None = None) -> None:
    """The command. Ends with status 1 when the two losses differ, and with the status of a training that failed."""
    parser = HfArgumentParser(
        DemoOptions,  # pyright: ignore
        prog="python -m recipes.one_billion_word.demo",
        description="Compare the stock loss and a patched one. Options of recipes.one_billion_word are passed on.",
        allow_abbrev=False,
    )
    options, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    try:
        difference = compare(options.loss, Path(options.output_dir), rest)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if not difference <= TOLERANCE:
        print(f"error: the losses at the end differ by {difference:.2g}, more than {TOLERANCE:g}", file=sys.stderr)
        raise SystemExit(1)


def compare(loss: str, folder: Path, rest: list[str]) -> float:
    """Train both sides, time them, print the table and write table, plot and results.

    Returns:
        By how much the losses at the end differ.

    Raises:
        RecipeError: an option cannot be used.
    """
    began = time.monotonic()
    check_loss(parse_options([*_words(DEFAULTS), *rest, "--loss", loss])[1])
    stock = train_side(STOCK, folder, rest)
    patched = train_side(loss, folder, rest)
    print("\n=== seconds of a step, in turn ===", flush=True)
    seconds = time_sides(loss, folder, rest)
    for side, median in zip((stock, patched), seconds, strict=True):
        side["seconds_per_step_in_turn_median"] = median
    table = comparison(stock, patched)
    plot = folder / "losses.png"
    plot_losses({STOCK: stock["history"], loss: patched["history"]}, plot, stock["data"])
    report = {"stock": stock, "patched": patched, "seconds": time.monotonic() - began}
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "table.txt").write_text(table)
    print(f"\n{table}\nplot: {plot}   numbers: {folder / 'results.json'}   {report['seconds']:.0f} seconds in all")
    return loss_difference(stock, patched)


def train_side(loss: str, folder: Path, rest: list[str]) -> dict[str, Any]:
    """Run the recipe with one loss in a process of its own and read its results."""
    print(f"\n=== loss: {loss} ===", flush=True)
    target = folder / loss
    options = [*_words(DEFAULTS), *rest, "--loss", loss, "--output_dir", str(target)]
    root = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    environment.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler's own notices, which say nothing here
    status = subprocess.run([sys.executable, "-m", "recipes.one_billion_word", *options], env=environment).returncode
    if status:
        raise SystemExit(status)
    return json.loads((target / "results.json").read_text())


def time_sides(loss: str, folder: Path, rest: list[str]) -> tuple[float, float]:
    """Median seconds of a step of the trained stock model and of the trained patched one, measured in turn."""
    stock_folder = folder / STOCK
    options = [*_words(DEFAULTS), *rest, "--loss", loss, "--output_dir", str(stock_folder)]
    data_options, model_options, _, training = parse_options(options)
    blocks = prepare_data(data_options, stock_folder / "data").train
    size = training.per_device_train_batch_size
    batches = [
        default_data_collator([blocks[(first + index) % len(blocks)] for index in range(size)])  # pyright: ignore
        for first in range(0, TIMED_STEPS * size, size)
    ]
    stock: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(stock_folder / "model")
    patched: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder / loss / "model")
    models = {"stock": stock, "patched": apply_loss(patched, model_options)}
    seconds = seconds_per_step(models, batches, training)  # pyright: ignore
    return seconds["stock"], seconds["patched"]


def loss_difference(stock: dict[str, Any], patched: dict[str, Any]) -> float:
    """The larger of the differences of the training and of the validation losses at the end."""
    return max(
        abs(stock["train_loss"] - patched["train_loss"]),
        abs(stock["valid"]["loss"] - patched["valid"]["loss"]),
    )


def comparison(stock: dict[str, Any], patched: dict[str, Any]) -> str:
    """The table that the demo prints."""
    sides = (stock, patched)
    peaks = [side["loss_memory_bytes"]["peak"] / 1e6 for side in sides]
    gradients = [side["loss_memory_bytes"]["gradients"] / 1e6 for side in sides]
    process = [side["process_peak_bytes"] / 1e6 for side in sides]
    seconds = [side["seconds_per_step_in_turn_median"] for side in sides]
    rows = [
        ("training loss at the end", *_differing(stock["train_loss"], patched["train_loss"])),
        ("validation loss at the end", *_differing(stock["valid"]["loss"], patched["valid"]["loss"])),
        ("peak memory of the loss, MB", *_ratio(peaks[0], peaks[1], ".1f")),
        ("  beyond its gradients, MB", *_ratio(peaks[0] - gradients[0], peaks[1] - gradients[1], ".1f")),
        ("peak memory of the process, MB", *_ratio(process[0], process[1], ".0f")),
        ("seconds a step (median)", *_ratio(seconds[0], seconds[1], ".3f")),
    ]
    logits = stock["loss_memory_bytes"]["logits"] / 1e6
    lines = [
        stock["data"],
        f"{stock['vocabulary']:,} words, {stock['parameters']:,} parameters, one seed, {stock['steps']} steps of "
        f"{stock['tokens_per_step']:,} tokens; the logits of a step take {logits:.1f} MB",
        "",
        f"{'':<32}{'stock':>12}{patched['loss']:>12}    patched / stock",
        *(f"{name:<32}{left:>12}{right:>12}    {last}" for name, left, right, last in rows),
    ]
    return "\n".join(lines) + "\n"


def _differing(stock: float, patched: float) -> tuple[str, str, str]:
    difference = abs(stock - patched)
    verdict = "equal" if difference <= TOLERANCE else "DIFFERENT"
    return f"{stock:.4f}", f"{patched:.4f}", f"{verdict}: they differ by {difference:.1e}"


def _ratio(stock: float, patched: float, form: str) -> tuple[str, str, str]:
    return format(stock, form), format(patched, form), f"{patched / stock:.3f}"


def _words(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


if __name__ == "__main__":
    main()
