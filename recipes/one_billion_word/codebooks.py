"""`python -m recipes.one_billion_word.codebooks`: codebooks of several sizes beside the dense projection.

The dense model is trained first. Each codebook is then trained twice: from scratch, for as many steps, and from the
dense model, for some more. Compared are perplexity, parameters of the head, and the seconds that all logits of a few
rows take. A codebook of as many codes as words is a dense projection with the logarithm of the counts as its bias:
beside it, in short runs, it shows what knowing the counts is worth.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser

import xhead
from recipes.one_billion_word.errors import RecipeError
from recipes.one_billion_word.options import VQ, parse_options
from recipes.one_billion_word.plots import plot_codebooks
from recipes.one_billion_word.train import run

TIMED_ROWS = 256
REPEATS = 9

DEFAULTS = {
    "--vocab_size": "4096",
    "--hidden_size": "64",
    "--layers": "1",
    "--warmup_steps": "15",
    "--learning_rate": "3e-3",
    "--logging_steps": "50",
    "--save_strategy": "no",
    "--valid_sentences": "1000",
    "--evaluate_test": "False",
    "--disable_tqdm": "True",
}


@dataclass
class CodebookOptions:
    """What the comparison itself takes; every other option goes to all trainings."""

    output_dir: str = field(default="runs/codebooks", metadata={"help": "Where table, plot and numbers are written."})
    sizes: str = field(
        default="64,256,1024,4096", metadata={"help": "Codebook sizes K, at most the number of words; with commas."}
    )
    steps: int = field(default=300, metadata={"help": "Training steps from scratch."})
    tuning_steps: int = field(default=100, metadata={"help": "Training steps of a codebook from the dense model."})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """The command: codebooks.json, codebooks.md and codebooks.png. What the user got wrong ends it with status 2."""
    parser = HfArgumentParser(
        CodebookOptions,  # pyright: ignore
        prog="python -m recipes.one_billion_word.codebooks",
        description="Compare codebooks of several sizes with the dense projection.",
        allow_abbrev=False,
    )
    options, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    try:
        return compare(options, rest)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def compare(options: CodebookOptions, rest: list[str]) -> dict[str, Any]:
    """Train, time, print the table, and write table, plot and numbers.

    Raises:
        RecipeError: an option cannot be used.
    """
    if not all(size.strip().isdecimal() for size in options.sizes.split(",")):
        raise RecipeError(f"--sizes is {options.sizes!r}; give whole numbers with commas: 64,256,1024")
    folder = Path(options.output_dir)
    dense = folder / "dense"
    runs = {"dense": _train(dense, options.steps, rest)}
    for size in map(int, options.sizes.split(",")):
        head = ["--head", VQ, "--head_options", json.dumps({"codebook_size": size})]
        runs[f"scratch {size}"] = _train(folder / f"scratch-{size}", options.steps, [*rest, *head])
        tuned = [*head, "--start_from", str(dense)]
        runs[f"dense {size}"] = _train(folder / f"dense-{size}", options.tuning_steps, [*rest, *tuned])
    heads = {name: _head(folder / name.replace(" ", "-")) for name in runs}
    for name, seconds in _seconds_of_logits(heads).items():
        runs[name]["logits_seconds_median"] = seconds
    report = {
        "data": runs["dense"]["data"],
        "vocabulary": runs["dense"]["vocabulary"],
        "steps": options.steps,
        "tuning_steps": options.tuning_steps,
        "timed_rows": TIMED_ROWS,
        "runs": runs,
    }
    table = codebook_table(report)
    (folder / "codebooks.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "codebooks.md").write_text(table)
    plot_codebooks(report, folder / "codebooks.png")
    print(f"\n{table}\nwritten: codebooks.json, codebooks.md, codebooks.png in {folder}")
    return report


def _train(folder: Path, steps: int, rest: list[str]) -> dict[str, Any]:
    print(f"\n=== {folder.name} ===", flush=True)
    fixed = {"--output_dir": str(folder), "--max_steps": str(steps), "--valid_steps": str(steps)}
    words = [word for pair in (DEFAULTS | fixed).items() for word in pair]
    results = run(*parse_options([*words, *rest]))
    return {name: value for name, value in results.items() if name != "history"}


def _head(folder: Path) -> torch.nn.Module:
    model_folder = folder / "model"
    is_dense = folder.name == "dense"
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder) if is_dense else xhead.load(model_folder)
    return model.get_output_embeddings().eval()


@torch.no_grad()
def _seconds_of_logits(heads: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> dict[str, float]:
    """Median seconds of all logits of `TIMED_ROWS` rows; the heads take turns, so that all meet the same machine."""
    width = next(iter(heads.values())).in_features  # pyright: ignore
    hidden = torch.randn(TIMED_ROWS, width)
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(REPEATS + 1):
        for name, head in heads.items():
            began = time.perf_counter()
            head(hidden)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def codebook_table(report: Mapping[str, Any]) -> str:
    """The table that the comparison prints, in Markdown."""
    runs = report["runs"]
    dense = runs["dense"]
    columns = ["head", "start", "parameters", "of dense", "floor, nats", "perplexity", "of dense", "logits, ms"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * 6]
    for name, found in runs.items():
        start, _, size = name.partition(" ")
        about = found["output_head"]
        steps = report["tuning_steps" if size and start == "dense" else "steps"]
        perplexity = found["valid"]["perplexity"]
        cells = (
            f"K = {int(size):,}" if size else "dense",
            f"dense, then {steps} steps" if size and start == "dense" else f"scratch, {steps} steps",
            f"{about['parameters']:,}",
            f"{about['parameters'] / dense['output_head']['parameters']:.1%}",
            f"{about['floor']:.3f}" if size else "0",
            f"{perplexity:.1f}",
            f"{perplexity / dense['valid']['perplexity'] - 1:+.1%}",
            f"{1e3 * found['logits_seconds_median']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    about = f"{report['data']}; {report['vocabulary']:,} words; logits of {report['timed_rows']} rows"
    return about + "\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
