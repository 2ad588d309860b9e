"""`python -m recipes.extreme_classification.compare RUN ...`: the runs of several models in one table and one plot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError

METRICS = ("P@1", "P@5", "nDCG@5", "PSP@1", "PSP@5")
SAME = ("data", "train_documents", "test_documents", "labels", "filtered_pairs")


def comparison(folders: Sequence[Path]) -> dict[str, Any]:
    """What the runs in some folders measured, together.

    Raises:
        RecipeError: a folder holds no results, or two were measured on different data.
    """
    runs = []
    for folder in folders:
        try:
            runs.append(json.loads((folder / "results.json").read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise RecipeError(f"{folder} holds no results of a model: {error}") from error
        # Where a run was written says nothing about it.
        runs[-1]["options"].pop("output_dir", None)
        for name in SAME:
            if runs[-1][name] != runs[0][name]:
                raise RecipeError(
                    f"{folder} was measured on another data set: {name} is {runs[-1][name]!r}, and {runs[0][name]!r} "
                    f"in {folders[0]}"
                )
    return {"runs": runs}


def table(record: Mapping[str, Any]) -> str:
    """A line a model, metrics in percent; then the labels that never occur in training, where there are any."""
    runs = record["runs"]
    width = max(len(run["model"]) for run in runs) + 2
    lines = ["model".ljust(width) + "".join(f"{name:>9}" for name in METRICS) + f"{'minutes':>10}{'CPU minutes':>13}"]
    for run in runs:
        metrics = "".join(f"{100 * run['metrics'][name]:9.2f}" for name in METRICS)
        seconds = run["seconds"]
        lines.append(run["model"].ljust(width) + metrics + f"{seconds['wall'] / 60:10.1f}{seconds['cpu'] / 60:13.1f}")
    never = runs[0]["by_frequency"][0]
    if never["truths"]:
        lines += ["", f"{never['labels']:,} labels never occur in training; {never['truths']:,} test truths are theirs"]
        lines += ["", "model".ljust(width) + f"{'recall@5':>9}{'part of P@5':>13}"]
        for run in runs:
            group = run["by_frequency"][0]
            lines.append(run["model"].ljust(width) + f"{100 * group['recall']:9.2f}{100 * group['precision']:13.3f}")
    return "\n".join(lines) + "\n"


def about(record: Mapping[str, Any]) -> str:
    """The data in one line."""
    run = record["runs"][0]
    a, b = run["propensity"]["A"], run["propensity"]["B"]
    return (
        f"{run['data']}: {run['train_documents']:,} + {run['test_documents']:,} documents, {run['labels']:,} labels, "
        f"{run['labels_per_train_document']:.2f} a document; propensities A = {a}, B = {b}; {run['environment']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command. What the user got wrong ends it with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.extreme_classification.compare", description="The runs of several models side by side."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="the --output_dir of each run")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/extreme_classification"))
    options = parser.parse_args(arguments)
    try:
        record = comparison(options.runs)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    # The tables are read where scipy is not installed too.
    from recipes.extreme_classification.evaluation import plot_groups
    from xhead.retrieval.frequency import Group

    groups = {run["model"]: [Group(**group) for group in run["by_frequency"]] for run in record["runs"]}
    plot_groups(groups, options.output_dir / "frequency.png", record["runs"][0]["data"])
    print(f"{about(record)}\n\n{table(record)}\n\nwritten: {options.output_dir}")


if __name__ == "__main__":
    main()
