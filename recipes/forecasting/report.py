"""The table, results.json and the fan chart."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from recipes.forecasting.scores import SCORES
from recipes.forecasting.windows import Windows

Runs = Mapping[str, Sequence[Mapping[str, float]]]


def table(runs: Runs) -> str:
    """Means and standard deviations over the seeds, a head a line; then the differences from the first head."""
    base, *others = runs
    lines = [f"mean +- standard deviation over {len(runs[base])} seeds; lower is better in all", ""]
    lines.append(f"{'head':<14}" + "".join(f"{title:>20}" for title in SCORES.values()) + f"{'head parameters':>18}")
    for head, of_head in runs.items():
        cells = [_spread([scores[name] for scores in of_head]) for name in SCORES]
        count = f"{int(of_head[0]['head_parameters']):,}"
        lines.append(f"{head:<14}" + "".join(f"{cell:>20}" for cell in cells) + f"{count:>18}")
    if others:
        lines += ["", f"less {base}, same seed: mean difference, and in how many seeds it is lower", ""]
    for head in others:
        cells = []
        for name in SCORES:
            pairs = [mine[name] - first[name] for mine, first in zip(runs[head], runs[base], strict=True)]
            lower = sum(difference < 0 for difference in pairs)
            cells.append(f"{statistics.fmean(pairs):+.4f} {lower}/{len(pairs)}")
        lines.append(f"{head:<14}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} +- {deviation:.4f}"


def write_report(
    runs: Runs, about: Mapping[str, Any], windows: Windows, paths: Mapping[str, Tensor], context: int, folder: Path
) -> dict[str, Any]:
    """What is in results.json. The first process prints the table, and writes it, results.json and fan.png."""
    results = {**about, "runs": runs}
    if not PartialState().is_main_process:
        return results
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.txt").write_text(table(runs))
    plot_fans(windows, paths, context, folder / "fan.png")
    print(f"\n{table(runs)}\nplot: {folder / 'fan.png'}   numbers: {folder / 'results.json'}")
    return results


def plot_fans(windows: Windows, paths: Mapping[str, Tensor], context: int, path: Path, shown: int = 3) -> None:
    """For some windows, the end of the context, what followed, and the heads' medians with their 80 % bands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picked = torch.linspace(0, len(windows.values) - 1, min(shown, len(windows.values))).long().tolist()
    figure = Figure(figsize=(4.5 * len(paths), 2.6 * len(picked)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(picked), len(paths), squeeze=False, sharey="row")
    for row, window in enumerate(picked):
        values = windows.values[window]
        begin = max(0, context - 2 * (len(values) - context))
        for column, (head, drawn) in enumerate(paths.items()):
            axes = panels[row][column]
            ahead = range(context, len(values))
            low, middle, high = torch.quantile(drawn[window], torch.tensor([0.1, 0.5, 0.9]).double(), dim=0)
            axes.plot(range(begin, len(values)), values[begin:], color="black", linewidth=1, label="measured")
            axes.plot(ahead, middle, color="C0", label="median")
            axes.fill_between(ahead, low, high, color="C0", alpha=0.3, label="10 % to 90 %")
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(head)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=100)
