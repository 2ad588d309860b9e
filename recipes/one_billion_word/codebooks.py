"""`python -m recipes.one_billion_word.codebooks`: codebooks of several kinds and sizes beside the dense projection.

The dense model is trained first. Each codebook is then trained twice: from scratch, for as many steps, and from the
dense model, for some more. Compared are perplexity, parameters of the head, and the seconds that all logits of a few
rows take. "plain" has one code a token and nothing else; "frequent" gives half of the codes to one frequent word each;
"bias" adds a bias a token, and "two codes" splits the rows into two codebooks. "bias" is also trained with as many
rows as words, a dense projection with such a bias: in short runs it shows what knowing the counts is worth.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser

import xhead
from recipes.common.errors import RecipeError
from recipes.one_billion_word.options import VQ, parse_options
from recipes.one_billion_word.plots import plot_codebooks
from recipes.one_billion_word.train import run

BIAS = "bias"
SCRATCH, TUNED = "scratch", "dense"
TIMED_ROWS = 256
REPEATS = 9

DEFAULTS = {
    "--vocab_size": "4096",
    "--hidden_size": "64",
    "--layers": "1",
    "--tie_embeddings": "False",
    "--warmup_steps": "15",
    "--learning_rate": "3e-3",
    "--logging_steps": "50",
    "--save_strategy": "no",
    "--valid_sentences": "1000",
    "--evaluate_test": "False",
    "--disable_tqdm": "True",
}

# What each variant adds to a codebook of K rows in all; other options are the recipe's, which depend on the start.
VARIANTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda size: {"codebook_size": size, "frequent": 0, "token_bias": "none"},
    "frequent": lambda size: {"codebook_size": size, "frequent": size // 2, "token_bias": "none"},
    BIAS: lambda size: {"codebook_size": size, "frequent": size // 2},
    "two codes": lambda size: {
        "codebook_size": size - size // 2,
        "residual_size": size // 2,
        "frequent": size // 4,
    },
    "reassigned": lambda size: {"codebook_size": size, "frequent": size // 2, "mapping": "reassigned"},
}


@dataclass
class CodebookOptions:
    """What the comparison itself takes; every other option goes to all trainings."""

    output_dir: str = field(default="runs/codebooks", metadata={"help": "Where table, plot and numbers are written."})
    sizes: str = field(
        default="64,256,1024", metadata={"help": "Rows K of the codebooks, 4 to the number of words; with commas."}
    )
    variants: str = field(
        default="plain,frequent,bias,two codes", metadata={"help": f"With commas, of: {', '.join(VARIANTS)}."}
    )
    steps: int = field(default=800, metadata={"help": "Training steps from scratch."})
    tuning_steps: int = field(default=200, metadata={"help": "Training steps of a codebook from the dense model."})

    def __post_init__(self) -> None:
        if not all(size.strip().isdecimal() and int(size) >= 4 for size in self.sizes.split(",")):
            raise RecipeError(f"--sizes is {self.sizes!r}; give whole numbers of at least 4 with commas: 64,256,1024")
        unknown = [name for name in self.parsed_variants if name not in VARIANTS]
        if unknown:
            raise RecipeError(f"--variants has {', '.join(unknown)}; known are {', '.join(VARIANTS)}")

    @property
    def parsed_sizes(self) -> list[int]:
        return [int(size) for size in self.sizes.split(",")]

    @property
    def parsed_variants(self) -> list[str]:
        return [name.strip() for name in self.variants.split(",")]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """The command: codebooks.json, codebooks.md and codebooks.png. What the user got wrong ends it with status 2."""
    parser = HfArgumentParser(
        CodebookOptions,  # pyright: ignore
        prog="python -m recipes.one_billion_word.codebooks",
        description="Compare codebooks of several sizes with the dense projection.",
        allow_abbrev=False,
    )
    try:
        options, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        return compare(options, rest)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def compare(options: CodebookOptions, rest: list[str]) -> dict[str, Any]:
    """Train, time, print the table, and write table, plot and numbers.

    Raises:
        RecipeError: an option cannot be used.
    """
    folder = Path(options.output_dir)
    dense = folder / "dense"
    runs = [{"variant": "dense", "rows": None, "start": SCRATCH, **_train(dense, options.steps, rest)}]
    folders = [dense]
    cases = list(product(options.parsed_variants, options.parsed_sizes))
    if BIAS in options.parsed_variants:  # knowing the counts, without sharing rows
        cases.append((BIAS, runs[0]["vocabulary"]))
    for variant, size in dict.fromkeys(cases):
        head = ["--head", VQ, "--head_options", json.dumps(VARIANTS[variant](size))]
        for start in (SCRATCH, TUNED):
            folders.append(folder / f"{variant}-{size}-{start}".replace(" ", "-"))
            more = ["--start_from", str(dense)] if start == TUNED else []
            _share_data(dense, folders[-1])
            results = _train(folders[-1], options.tuning_steps if more else options.steps, [*rest, *head, *more])
            runs.append({"variant": variant, "rows": size, "start": start, **results})
    heads = {str(each): _head(each, dense=each == dense) for each in folders}
    for found, seconds in zip(runs, _seconds_of_logits(heads).values(), strict=True):
        found["logits_seconds_median"] = seconds
    report = {
        "data": runs[0]["data"],
        "vocabulary": runs[0]["vocabulary"],
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


def _share_data(source: Path, folder: Path) -> None:
    """Let a run find the words and blocks that another has made of the same data."""
    if not (folder / "data").exists():
        shutil.copytree(source / "data", folder / "data", copy_function=os.link)


def _head(folder: Path, *, dense: bool) -> torch.nn.Module:
    model_folder = folder / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder) if dense else xhead.load(model_folder)
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
    dense = report["runs"][0]
    titles = ["head", "rows", "start", "parameters", "of dense", "floor, nats", "perplexity", "of dense", "logits, ms"]
    lines = ["| " + " | ".join(titles) + " |", "|---|---:|---|" + "---:|" * 6]
    for found in report["runs"]:
        about = found["output_head"]
        steps = {SCRATCH: f"scratch, {report['steps']}", TUNED: f"dense, then {report['tuning_steps']}"}
        perplexity = found["valid"]["perplexity"]
        cells = (
            found["variant"],
            "" if found["rows"] is None else f"{found['rows']:,}",
            f"{steps[found['start']]} steps",
            f"{about['parameters']:,}",
            f"{about['parameters'] / dense['output_head']['parameters']:.1%}",
            f"{about.get('floor', 0):.3f}",
            f"{perplexity:.1f}",
            f"{perplexity / dense['valid']['perplexity'] - 1:+.1%}",
            f"{1e3 * found['logits_seconds_median']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    about = f"{report['data']}; {report['vocabulary']:,} words; logits of {report['timed_rows']} rows"
    return about + "\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
