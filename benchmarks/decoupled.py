"""`python -m benchmarks.decoupled`: the decoupled softmax over all labels of extreme classification, on the CPU.

Forward and backward beside dense PyTorch, each number of labels measured in turns in one run; the dense side is left
out where its logits do not fit. `--preset quick` is the smallest size alone.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import xhead
from benchmarks import measure
from benchmarks.cpu import progress, relative_error
from benchmarks.report import RESULTS, markdown_table, megabytes, save_json
from xhead.losses import get_loss

PRESETS = {"quick": [41_218], "full": [41_218, 131_073, 1_300_000]}
DENSE = "dense PyTorch"
OURS = "xhead decoupled_softmax"
TEMPERATURE = 0.05
_DENSE_COPIES = 5  # logits, masked logits, exponentials and two gradients of them, at the most


class Training:
    """Unit vectors of queries and labels, a few right labels a query; the gradients stay until the next call."""

    def __init__(self, batch: int, labels: int, size: int, positives: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = F.normalize(torch.randn(labels, size, generator=generator), dim=-1).requires_grad_()
        self.right = torch.randint(labels, (batch, positives), generator=generator)
        # Queries lie near their labels, as those of a trained encoder do.
        near = self.weight.detach()[self.right].mean(1) + 0.05 * torch.randn(batch, size, generator=generator)
        self.hidden = F.normalize(near, dim=-1).requires_grad_()
        row = torch.arange(batch).repeat_interleave(positives)
        self.row, self.column = torch.stack([row, self.right.flatten()]).unique(dim=1)
        self.count = torch.bincount(self.row, minlength=batch)

    def reset(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        return self.hidden.grad, self.weight.grad

    def ours(self) -> Tensor:
        logits = xhead.LazyLogits(self.hidden, self.weight)
        return get_loss("decoupled_softmax", temperature=TEMPERATURE)(logits, self.right).mean()

    def dense(self) -> Tensor:
        logits = F.linear(self.hidden / TEMPERATURE, self.weight)
        right = logits[self.row, self.column]
        wrong = logits.index_put((self.row, self.column), logits.new_tensor(-torch.inf)).logsumexp(1)
        each = F.softplus(wrong[self.row] - right)
        return (torch.zeros_like(wrong).index_add(0, self.row, each) / self.count).mean()

    def step(self, name: str) -> None:
        self.reset()
        (self.ours() if name == OURS else self.dense()).backward()


def measure_labels(training: Training, repeats: int, *, dense: bool) -> list[dict[str, object]]:
    """A record a side: seconds, memory, and the distance of the gradients from those of dense PyTorch."""
    names = [DENSE, OURS] if dense else [OURS]
    timings = measure.time_interleaved(
        {name: partial(training.step, name) for name in names}, repeats=repeats, report=progress
    )
    truth: list[Tensor | None] = [None, None]
    records = []
    for name in names:
        training.step(name)
        found = training.gradients()
        errors = [None if t is None or g is None else relative_error(g, t) for g, t in zip(found, truth, strict=True)]
        if name == DENSE:
            truth = list(found)
            errors = [0.0, 0.0]
        del found
        peak = measure.peak_memory(partial(training.step, name), results=training.gradients, reset=training.reset)
        records.append(
            {
                "name": name,
                "labels": training.weight.shape[0],
                **timings[name].summary(),
                "hidden_error": errors[0],
                "weight_error": errors[1],
                "beyond_gradients": peak.beyond,
                "resident": peak.resident,
            }
        )
    return records


def table(records: list[dict]) -> str:
    dense = {record["labels"]: record["median"] for record in records if record["name"] == DENSE}
    rows = []
    for record in records:
        base = dense.get(record["labels"])
        errors = [record["hidden_error"], record["weight_error"]]
        rows.append(
            [
                f"{record['labels']:,}",
                record["name"],
                f"{record['median']:.2f}",
                "-" if base is None else f"{record['median'] / base:.2f}",
                megabytes(record["beyond_gradients"]),
                megabytes(record["resident"]),
                *("-" if error is None else f"{error:.1e}" for error in errors),
            ]
        )
    columns = ["labels", "loss", "seconds", "x dense", "MB beyond gradients", "MB resident, with gradients"]
    return markdown_table([*columns, "hidden error", "weight error"], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    description = "Decoupled softmax over all labels: time, memory and gradient error, on the CPU."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoupled", description=description)
    parser.add_argument("--preset", choices=PRESETS, default="full", help="sizes to measure (default %(default)s)")
    parser.add_argument("--labels", type=int, nargs="+", help="numbers of labels, in place of the preset's")
    parser.add_argument("--batch", type=int, default=1024, help="queries (default %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="size of a vector (default %(default)s)")
    parser.add_argument("--positives", type=int, default=5, help="right labels a query (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; 3 at most from a million labels on")
    parser.add_argument("--dense-gigabytes", type=float, default=8.0, help="memory that the dense side may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "decoupled.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    environment = measure.environment()
    print(f"{environment}\n")
    records: list[dict] = []
    for labels in options.labels or PRESETS[options.preset]:
        dense = _DENSE_COPIES * 4 * options.batch * labels <= options.dense_gigabytes * 1e9
        print(f"{labels:,} labels, logits {4e-6 * options.batch * labels:.0f} MB{'' if dense else ', dense left out'}")
        training = Training(options.batch, labels, options.width, options.positives, options.seed)
        repeats = options.repeats if labels < 1_000_000 else min(options.repeats, 3)
        records += measure_labels(training, repeats, dense=dense)
    sizes = {"N": options.batch, "D": options.width, "positives": options.positives, "temperature": TEMPERATURE}
    record = {"environment": environment, "inputs": sizes, "decoupled": records}
    print(f"\n{table(records)}\n")
    save_json(options.output, record)
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
