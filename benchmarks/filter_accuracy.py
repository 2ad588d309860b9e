"""`python -m benchmarks.filter_accuracy`: what the gradient filter costs in accuracy, dropped and compensated.

Relative error of the gradients of hidden and weight against the exact ones in float64, for each threshold, with the
share of the softmax that is kept and the time: a table, JSON and a plot. The filter works here even where it would
stand aside because it does not pay.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import inputs as head_inputs
from benchmarks import measure
from benchmarks.cpu import Loss, Training, progress, relative_error, stock, xhead_loss
from benchmarks.inputs import HeadInputs
from benchmarks.report import RESULTS, markdown_table, power_of_two, save_json
from xhead.engines import skipping


def exact_gradients(inputs: HeadInputs, block: int = 256) -> tuple[Tensor, Tensor]:
    """Gradients of the mean cross-entropy for hidden (N, D) and weight (V, D), in float64, some rows at a time."""
    weight = inputs.weight.double()
    rows = inputs.hidden.shape[0]
    hidden_grad = torch.empty(inputs.hidden.shape, dtype=torch.float64)
    weight_grad = torch.zeros(weight.shape, dtype=torch.float64)
    for start in range(0, rows, block):
        hidden = inputs.hidden[start : start + block].double()
        residual = torch.softmax(hidden @ weight.T, dim=1)
        residual[torch.arange(hidden.shape[0]), inputs.target[start : start + block]] -= 1
        residual /= rows
        hidden_grad[start : start + block] = residual @ weight
        weight_grad.addmm_(residual.T, hidden)
    return hidden_grad, weight_grad


def measure_filter(inputs: HeadInputs, thresholds: list[float], repeats: int) -> list[dict[str, object]]:
    """A record for each threshold, compensated and dropped; the first two are stock and the exact gradient of xhead."""
    truth = exact_gradients(inputs)
    softmax = head_inputs.softmax_of(inputs, tuple(thresholds))
    training = Training(inputs)
    cases: dict[tuple[str, float | None], Loss] = {("stock", None): stock}
    cases["exact", None] = xhead_loss(filter_eps=None)
    for eps in thresholds:
        for name, compensate in (("compensated", True), ("dropped", False)):
            cases[name, eps] = xhead_loss(filter_eps=eps, compensate=compensate)
    timings = measure.time_interleaved(
        {f"{name} {eps}": partial(training.step, loss) for (name, eps), loss in cases.items()},
        repeats=repeats,
        report=progress,
    )
    records: list[dict[str, object]] = []
    for (name, eps), loss in cases.items():
        training.step(loss)
        hidden_error, weight_error = (
            relative_error(g.double(), t) for g, t in zip(training.gradients(), truth, strict=True)
        )
        records.append(
            {
                "name": name,
                "filter_eps": eps,
                "kept_share": softmax.kept_share[power_of_two(eps)] if eps else 1.0,
                "skipped_mass": 1 - softmax.kept_mass[power_of_two(eps)] if eps else 0.0,
                "hidden_error": hidden_error,
                "weight_error": weight_error,
                "time": timings[f"{name} {eps}"].summary(),
            }
        )
    return records


def accuracy_table(records: list[dict]) -> str:
    base = records[0]["time"]["median"]
    by_case = {(record["name"], record["filter_eps"]): record for record in records}
    rows = []
    for record in records:
        other = by_case.get(("dropped", record["filter_eps"])) if record["name"] == "compensated" else None
        gain = "-" if other is None else f"{other['hidden_error'] / record['hidden_error']:.1f}"
        rows.append(
            [
                f"{record['name']} {power_of_two(record['filter_eps'])}",
                f"{record['kept_share']:.3%}",
                f"{record['skipped_mass']:.3f}",
                f"{record['hidden_error']:.2e}",
                gain,
                f"{record['weight_error']:.2e}",
                f"{record['time']['median']:.3f}",
                f"{record['time']['median'] / base:.2f}",
            ]
        )
    columns = ["gradient", "entries kept", "mass skipped", "hidden error", "gain", "weight error", "seconds", "x stock"]
    return markdown_table(columns, rows)


def plot(records: list[dict], title: str, path: Path) -> None:
    """Error against threshold, hidden and weight side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, name in zip(panels, ("hidden", "weight"), strict=True):
        for style, marker, color in (("dropped", "s", "tab:red"), ("compensated", "o", "tab:blue")):
            points = sorted((r["filter_eps"], r[f"{name}_error"]) for r in records if r["name"] == style)
            axes.loglog([p[0] for p in points], [p[1] for p in points], marker=marker, color=color, label=style, base=2)
        axes.set_yscale("log", base=10)
        axes.axhline(0.02, color="0.6", linewidth=0.8, linestyle="--")
        axes.set(title=f"gradient of {name}", xlabel="filter_eps: softmax entries below it are skipped")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error, against exact float64")
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    description = "Accuracy and time of the gradient filter, dropped and compensated."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filter_accuracy", description=description)
    head_inputs.add_arguments(parser, rows=1024, classes=33278, width=256)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default %(default)s)")
    parser.add_argument("--exponents", type=int, nargs="+", default=[6, 8, 10, 12, 14, 16], help="12 is 2^-12")
    parser.add_argument("--output", type=Path, default=RESULTS / "filter_accuracy.json", help="the plot lies beside it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    inputs = head_inputs.from_arguments(options)
    softmax = head_inputs.softmax_of(inputs)
    print(f"{inputs.source}: {inputs.shape}, {inputs.hidden.dtype}; {head_inputs.describe(softmax)}\n")
    with skipping.always():
        records = measure_filter(inputs, [2.0 ** -abs(e) for e in options.exponents], options.repeats)
    print(f"\n{accuracy_table(records)}\n")
    record = {
        "environment": measure.environment(),
        "inputs": head_inputs.record_of(inputs, softmax),
        "filter": records,
    }
    save_json(options.output, record)
    picture = options.output.with_suffix(".png")
    shape = ", ".join(f"{name} {size}" for name, size in inputs.shape.items())
    plot(records, f"{inputs.source}; {shape}; perplexity {softmax.perplexity:.0f}", picture)
    print(f"written: {options.output}, {picture}")
    return record


if __name__ == "__main__":
    main()
