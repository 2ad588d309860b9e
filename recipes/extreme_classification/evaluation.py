"""Measure the predictions of any model on a data set: one table, results.json, frequency.png."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from recipes.extreme_classification.dataset import Splits
from xhead.retrieval.frequency import Group, by_frequency
from xhead.retrieval.metrics import evaluate, rank

KS = (1, 3, 5)
RECALL_KS = (10, 100)


class Clock:
    """Seconds since it was made, of wall time and of this process's CPU time, all threads together."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """`wall` and `cpu`."""
        return {"wall": time.perf_counter() - self._start[0], "cpu": time.process_time() - self._start[1]}


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        metrics: shares of 1 by name, as `P@1`.
        groups: by label frequency, the first the labels that never occur in training.
        about: the data set, its sizes, and the constants of the propensities.
    """

    metrics: Mapping[str, float]
    groups: Sequence[Group]
    about: Mapping[str, Any]


def ranks_needed(splits: Splits) -> int:
    """How many labels to predict for a document, so that enough are left when pairs were filtered, up to all."""
    filtered = 0 if splits.filter is None else int(np.bincount(splits.filter[:, 0], minlength=1).max(initial=0))
    return min(max(*KS, *RECALL_KS) + filtered, splits.test.shape[1])


def measure(splits: Splits, predictions: np.ndarray | csr_matrix) -> Evaluation:
    """Measure predictions for the test split.

    Args:
        splits: the data set.
        predictions: labels (documents, `ranks_needed(splits)`) in the order of their ranks, -1 for none; or csr scores
            (documents, labels).

    Raises:
        ValueError: they do not fit the test split.
    """
    labels = splits.test.shape[1]
    ranking = rank(predictions, splits.test.labels, splits.filter, k=min(max(*KS, *RECALL_KS), labels))
    train = splits.train.labels
    metrics = evaluate(
        ranking,
        train,
        ks=[k for k in KS if k <= labels],
        constants=splits.propensity,
        recall_ks=[k for k in RECALL_KS if k <= labels],
    )
    about = {
        "data": splits.name,
        "train_documents": splits.train.shape[0],
        "test_documents": splits.test.shape[0],
        "test_documents_without_labels": int((ranking.label_counts == 0).sum()),
        "labels": labels,
        "labels_per_train_document": train.nnz / max(splits.train.shape[0], 1),
        "filtered_pairs": 0 if splits.filter is None else len(splits.filter),
        "propensity": dict(zip("AB", splits.propensity, strict=True)),
    }
    return Evaluation(metrics, by_frequency(ranking, train, k=min(KS[-1], labels)), about)


def table(evaluation: Evaluation) -> str:
    """Percentages: the metrics, then the groups of labels."""
    about = evaluation.about
    lines = [
        f"{about['data']}: {about['train_documents']:,} + {about['test_documents']:,} documents, "
        f"{about['labels']:,} labels, {about['labels_per_train_document']:.2f} a document; "
        f"propensities A = {about['propensity']['A']}, B = {about['propensity']['B']}",
        "",
    ]
    for name in ("P", "nDCG", "PSP", "PSnDCG", "recall"):
        of_name = {key: value for key, value in evaluation.metrics.items() if key.partition("@")[0] == name}
        lines.append("   ".join(f"{key:>9} {100 * value:6.2f}" for key, value in of_name.items()))
    lines += ["", "in training       labels  test truths  part of P@5  recall@5"]
    for group in evaluation.groups:
        recall = "-" if group.recall is None else f"{100 * group.recall:.2f}"
        times = "never" if group.most == 0 else f"{group.fewest:,} to {group.most:,}"
        lines.append(f"{times:<15}{group.labels:>9,}{group.truths:>13,}{100 * group.precision:>13.2f}{recall:>10}")
    return "\n".join(lines) + "\n"


def write_evaluation(
    evaluation: Evaluation, folder: Path, *, model: str, clock: Clock, **more: object
) -> dict[str, Any]:
    """Print the table, and write it, results.json and frequency.png.

    Args:
        evaluation: what `measure` gives.
        folder: where to.
        model: what it is called.
        clock: how long it took.
        more: for results.json, such as the options.

    Returns:
        What results.json holds.
    """
    environment = f"torch {version('torch')}, {date.today()}"
    seconds = clock.seconds()
    results = {"model": model, "seconds": seconds, **more, **evaluation.about, "environment": environment}
    results["metrics"] = dict(evaluation.metrics)
    results["by_frequency"] = [asdict(group) for group in evaluation.groups]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.txt").write_text(table(evaluation))
    print(table(evaluation) + f"seconds: {seconds['wall']:.1f}, of CPU time {seconds['cpu']:.1f}")
    try:
        plot_groups({model: evaluation.groups}, folder / "frequency.png", str(results["data"]))
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
    return results


def plot_groups(of_models: Mapping[str, Sequence[Group]], path: Path, title: str) -> None:
    """Bars: the part of P@5 and the recall@5 of each group of labels, for one or more models side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    width = 0.8 / len(of_models)
    for row, (name, label) in enumerate((("precision", "part of P@5, %"), ("recall", "recall@5, %"))):
        axes = figure.add_subplot(2, 1, row + 1)
        for number, (model, groups) in enumerate(of_models.items()):
            places = np.arange(len(groups)) - 0.4 + (number + 0.5) * width
            axes.bar(places, [100 * (getattr(group, name) or 0.0) for group in groups], width, label=model)
        groups = next(iter(of_models.values()))
        ticks = ["never" if group.most == 0 else f"{group.fewest} to {group.most}" for group in groups]
        axes.set_xticks(range(len(groups)), ticks, fontsize="small")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, axis="y")
        axes.legend()
    figure.supxlabel("times that a label occurs in training: those that never do, then tenths of the others")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)
