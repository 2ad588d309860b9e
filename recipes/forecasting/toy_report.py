"""The toy experiment's table, beside the published numbers, and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# From the metrics stored in the authors' repository: KL (mean, standard deviation) over four seeds, mean smoothness.
PUBLISHED = {
    "dense": {"gaussian": (0.170, 0.052, 0.116), "mixture": (0.238, 0.032, 0.068), "beta": (0.234, 0.032, 0.127)},
    "fourier-12": {"gaussian": (0.116, 0.043, 0.057), "mixture": (0.146, 0.033, 0.038), "beta": (0.191, 0.016, 0.077)},
    "fourier-12-1e-6": {
        "gaussian": (0.124, 0.023, 0.053),
        "mixture": (0.171, 0.056, 0.035),
        "beta": (0.193, 0.019, 0.077),
    },
}


def toy_table(results: Mapping[str, Any]) -> str:
    """KL and smoothness, mean and standard deviation over the seeds, a head and distribution a line."""
    seeds = results["options"]["seeds"]
    lines = [
        f"KL to the true density in nats, and smoothness (lower is smoother): mean +- standard deviation over "
        f"{len(seeds)} seeds",
        "",
        f"{'head':<18}{'distribution':<14}{'KL':>16}{'published KL':>18}{'smoothness':>18}{'published':>11}",
    ]
    for head, by_name in results["scores"].items():
        for name, by_seed in by_name.items():
            kl, rough = ([score[key] for score in by_seed.values()] for key in ("kl", "smoothness"))
            known = PUBLISHED.get(head, {}).get(name)
            cells = [_spread(kl), "-" if known is None else f"{known[0]:.3f} +- {known[1]:.3f}"]
            cells += [_spread(rough), "-" if known is None else f"{known[2]:.3f}"]
            widths = (16, 18, 18, 11)
            shown = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(f"{head:<18}{name:<14}{shown}")
    for name, value in results["true_smoothness"].items():
        lines.append(f"{'true density':<18}{name:<14}{'':>16}{'':>18}{value:>18.3f}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} +- {deviation:.3f}"


def plot_masses(centres: Tensor, curves: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """For each distribution, the first test sample's true masses and those of every head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(curves.values())))
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for position, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), position + 1)
        for number, (label, of_label) in enumerate(curves.items()):
            style: dict[str, Any] = {"color": "black", "linewidth": 2} if number == 0 else {"color": f"C{number - 1}"}
            axes.plot(centres, of_label[name], label=label, **style)
        axes.set_title(name)
        axes.set_xlabel("z")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.axes[0].set_ylabel("probability of a bin")
    figure.savefig(path, dpi=110)
