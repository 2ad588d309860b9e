"""The table, results.json and the plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from recipes.arithmetic.scores import SCORES, summary, verdict

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def table(runs: Runs) -> str:
    """Means and standard deviations over the seeds, a loss a line; then what differs from the first loss."""
    seeds = len(next(iter(runs.values())))
    lines = [f"mean +- standard deviation over {seeds} seeds", ""]
    lines.append(f"{'loss':<24}" + "".join(f"{title:>20}" for title in SCORES.values()))
    for loss, of_loss in runs.items():
        found = [summary(of_loss, name) for name in SCORES]
        cells = ["-" if each is None else f"{each[0]:.4g} +- {each[1]:.2g}" for each in found]
        lines.append(f"{loss:<24}" + "".join(f"{cell:>20}" for cell in cells))
    base, *others = runs
    for other in others:
        lines += ["", f"{other} against {base}, differences of the same seed (mean +- standard error):"]
        lines += [f"  {title:<14}{verdict(runs[base], runs[other], name)}" for name, title in SCORES.items()]
    return "\n".join(lines) + "\n"


def write_report(runs: Runs, about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Print the table; write it, results.json and scores.png: on the first process only."""
    base, *others = runs
    results = {
        **about,
        "runs": runs,
        "verdicts": {other: {name: verdict(runs[base], runs[other], name) for name in SCORES} for other in others},
    }
    if not PartialState().is_main_process:
        return results
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "table.txt").write_text(table(runs))
    plot_scores(runs, folder / "scores.png", str(about["data"]))
    print(f"\n{table(runs)}\nplot: {folder / 'scores.png'}   numbers: {folder / 'results.json'}")
    return results


def plot_scores(runs: Runs, path: Path, title: str) -> None:
    """A panel a score: a dot a seed, a line for the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(SCORES), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (name, label) in enumerate(SCORES.items()):
        axes = figure.add_subplot(1, len(SCORES), position + 1)
        for place, (loss, of_loss) in enumerate(runs.items()):
            values = [run[name] for run in of_loss if run[name] is not None]
            axes.plot([place] * len(values), values, "o", color=f"C{place}", label=loss)
            if values:
                mean = sum(values) / len(values)
                axes.plot([place - 0.3, place + 0.3], [mean, mean], color=f"C{place}", linewidth=2)
        axes.set_xticks(range(len(runs)), list(runs), rotation=30, ha="right", fontsize="small")
        axes.set_xlim(-0.6, len(runs) - 0.4)
        axes.set_title(label)
        axes.grid(alpha=0.3, axis="y")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)
