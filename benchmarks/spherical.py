"""`python -m benchmarks.spherical`: a training step of the spherical head beside the softmax over all classes.

Forward, backward and update of the output layer alone, by plain SGD: the spherical head at several numbers of classes,
and at the largest one a dense softmax and torch's adaptive softmax. `--small` is over in seconds.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.report import RESULTS, markdown_table, megabytes, save_json
from xhead.heads import SphericalHead

BATCHES = 8
RATE = 0.01


class Batches:
    """A few batches of hidden states after a ReLU and of Zipf-distributed labels, taken in turns."""

    def __init__(self, rows: int, size: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        uniform = torch.rand(BATCHES, rows, generator=generator, dtype=torch.float64)
        self.hidden = torch.randn(BATCHES, rows, size, generator=generator).relu_()
        self.labels = (classes**uniform).long().clamp_(max=classes) - 1
        self.turn = 0

    def next(self) -> tuple[Tensor, Tensor]:
        self.turn = (self.turn + 1) % BATCHES
        return self.hidden[self.turn].detach().requires_grad_(), self.labels[self.turn]


def spherical_step(batches: Batches, classes: int) -> Callable[[], object]:
    head = SphericalHead(batches.hidden.shape[-1], classes, "zloss")
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE)
    head.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        head(*batches.next()).backward()
        optimizer.step()

    return step


def dense_step(batches: Batches, classes: int) -> Callable[[], object]:
    layer = nn.Linear(batches.hidden.shape[-1], classes, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        hidden, labels = batches.next()
        F.cross_entropy(layer(hidden), labels).backward()
        optimizer.step()

    return step


def adaptive_step(batches: Batches, classes: int) -> Callable[[], object]:
    cutoffs = [cutoff for cutoff in (60_000, 100_000, 640_000) if cutoff < classes] or [classes // 10, classes // 3]
    layer = nn.AdaptiveLogSoftmaxWithLoss(batches.hidden.shape[-1], classes, cutoffs)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        hidden, labels = batches.next()
        layer(hidden, labels).loss.backward()
        optimizer.step()

    return step


SIDES = {"spherical head, Z-loss": spherical_step, "adaptive softmax": adaptive_step, "dense softmax": dense_step}
OURS = "spherical head, Z-loss"


def measure_together(steps: dict[tuple[str, int], Callable[[], object]], repeats: int, warmup: int) -> list[dict]:
    """A record each, timed in turns: seconds a step, and memory over what is held between steps."""
    labels = {f"{name}, V {classes:,}": (name, classes) for name, classes in steps}
    timings = measure.time_interleaved(
        {label: steps[key] for label, key in labels.items()}, repeats=repeats, warmup=warmup
    )
    records = []
    for label, (name, classes) in labels.items():
        peak = measure.peak_allocated(steps[name, classes])[0]
        print(f"  {label}: {1e3 * timings[label].median:.2f} ms", flush=True)
        summary = {key: value for key, value in timings[label].summary().items() if key != "seconds"}
        records.append({"name": name, "classes": classes, "steps": repeats, **summary, "beyond_weight": peak})
    return records


def measure_sides(options: argparse.Namespace) -> list[dict]:
    batches = {classes: Batches(options.rows, options.size, classes) for classes in options.classes}
    largest = max(batches)
    ours = {(OURS, classes): spherical_step(each, classes) for classes, each in batches.items()}
    records = measure_together(ours, options.steps, warmup=20)
    del ours
    for name in [name for name in SIDES if name != OURS]:
        # Each on its own: after a step that streams gigabytes, the next would find cold caches.
        step = SIDES[name](batches[largest], largest)
        records += measure_together({(name, largest): step}, options.repeats, warmup=1)
        del step
    return records


def spherical_table(records: list[dict]) -> str:
    ours = [record for record in records if record["name"] == OURS]
    last = max(ours, key=lambda record: record["classes"])["median"]
    rows = []
    for record in records:
        times = [f"{1e3 * record[key]:.2f}" for key in ("median", "min", "max")]
        ratio, memory = f"{record['median'] / last:.2f}", megabytes(record["beyond_weight"])
        rows.append([record["name"], f"{record['classes']:,}", times[0], ratio, *times[1:], memory])
    columns = ["output layer", "V", "ms a step, median", "x spherical head", "fastest", "slowest"]
    return markdown_table([*columns, "MB beyond the weight"], rows)


def plot(records: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in SIDES:
        points = sorted((each["classes"], 1e3 * each["median"]) for each in records if each["name"] == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="classes V", ylabel="ms a step (forward, backward, update)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spherical", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000, 793_471])
    parser.add_argument("--rows", type=int, default=200, help="rows a step (default %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="features (default %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="timed, of the spherical head (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed, of the others (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="1,000 and 5,000 classes, few steps")
    parser.add_argument("--output", type=Path, default=RESULTS / "spherical.json")
    options = parser.parse_args(arguments)
    if options.small:
        options.classes, options.rows, options.size, options.steps, options.repeats = [1000, 5000], 20, 32, 20, 3
    return options


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    shape = {"N": options.rows, "D": options.size}
    record: dict[str, object] = {"environment": measure.environment(), "shape": shape}
    print(f"{record['environment']}\n\n{shape}, float32, plain SGD\n")
    records = measure_sides(options)
    record["steps"] = records
    print(f"\n{spherical_table(records)}\n")
    save_json(options.output, record)
    plot(records, options.output.with_suffix(".png"))
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
