"""Training and validation losses as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str) -> None:
    """Draw the losses of one or more runs over the steps.

    Args:
        histories: for each run, the log history of the Trainer: entries with `step` and `loss` or `valid_loss`.
        path: the picture to write; its ending says the format.
        title: over the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, history) in enumerate(histories.items()):
        color = f"C{number}"
        # Runs that agree lie on one another: later ones are dashed, so that both can be seen.
        style = "-" if number == 0 else (0, (4, 4))
        for key, label, width, marker in (("loss", "train", 1.0, ""), ("valid_loss", "valid", 2.0, "o")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                steps, losses = zip(*points, strict=True)
                axes.plot(
                    steps,
                    losses,
                    color=color,
                    linestyle=style,
                    linewidth=width,
                    marker=marker,
                    label=f"{name}, {label}",
                )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_errors(report: Mapping[str, Any], path: Path) -> None:
    """Top-k error over k, a line a method: after the same steps on the left, after the same seconds on the right.

    Args:
        report: what the ranking comparison writes to ranking.json.
        path: the picture to write; its ending says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"at_steps": f"{report['steps']:,} steps each", "at_seconds": f"{report['seconds']:g} seconds each"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for method, found in report["methods"].items():
            errors = found[name]["errors"]
            axes.plot([int(k) for k in errors], [100 * error for error in errors.values()], marker="o", label=method)
        axes.set_xscale("log")
        axes.set_xlabel("k")
        axes.set_title(title, fontsize="small")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right word not among the k best, %")
    panels[0].legend()
    figure.suptitle(report["data"], fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_codebooks(report: Mapping[str, Any], path: Path) -> None:
    """Perplexity over the rows of the codebooks, a line a variant and start; the dense model's own is level.

    Args:
        report: what the comparison of codebooks writes to codebooks.json.
        path: the picture to write; its ending says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    dense, *codebooks = report["runs"]
    titles = {
        "scratch": f"from scratch, {report['steps']:,} steps",
        "dense": f"from the dense model, {report['tuning_steps']:,} steps more",
    }
    for axes, (start, title) in zip(panels, titles.items(), strict=True):
        for variant in dict.fromkeys(found["variant"] for found in codebooks):
            points = sorted(
                (found["rows"], found["valid"]["perplexity"])
                for found in codebooks
                if (found["variant"], found["start"]) == (variant, start)
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=variant)
        level = dense["valid"]["perplexity"]
        axes.axhline(level, color="black", linestyle="--", label=f"dense, {report['steps']:,} steps")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rows of the codebooks")
        axes.set_title(title, fontsize="small")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("validation perplexity")
    panels[0].legend()
    figure.suptitle(f"{report['data']}; {report['vocabulary']:,} words", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
