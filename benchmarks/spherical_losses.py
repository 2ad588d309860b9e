"""`python -m benchmarks.spherical_losses`: a step of the Z-loss on a plain weight, for few and for many rows.

Beside stock cross-entropy and the Z-loss of logits that are built: tiles, the Gram matrix of a weight that changed
since the last call, and one of several micro-batches inside `xhead.accumulate`, all in turns in one run.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import xhead
from benchmarks import measure
from benchmarks.report import RESULTS, markdown_table, save_json
from xhead.engines import weight_moments
from xhead.losses import get_loss

STOCK, DENSE, TILES = "cross-entropy, logits built", "Z-loss, logits built", "Z-loss, tiles"
GRAM, SHARED = "Z-loss, Gram", "Z-loss, Gram, a micro-batch of {count}"


def dense_zloss(logits: Tensor, target: Tensor) -> Tensor:
    """The Z-loss with a = 1 and b = 0, of logits (N, V): (N,)"""
    deviation = (logits.var(-1, correction=0) + 1e-12).sqrt()
    return F.softplus((logits.mean(-1) - logits.gather(1, target[:, None])[:, 0]) / deviation)


class Step:
    """One forward and backward of projection and loss at a shape, in the ways compared."""

    def __init__(self, rows: int, classes: int, size: int, micro_batches: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(rows, size, generator=generator).requires_grad_()
        self.weight = (torch.randn(classes, size, generator=generator) / size**0.5).requires_grad_()
        self.target = torch.randint(classes, (rows,), generator=generator)
        self.micro_batches = micro_batches

    def stock(self) -> None:
        self._backward(F.cross_entropy(self.hidden @ self.weight.T, self.target))

    def dense(self) -> None:
        self._backward(dense_zloss(self.hidden @ self.weight.T, self.target).mean())

    def tiles(self) -> None:
        self._backward(self._zloss("chunked"))

    def gram(self) -> None:
        weight_moments.clear()  # as after a step of the optimiser
        self._backward(self._zloss("gram"))

    def accumulated(self) -> None:
        """All micro-batches, whose seconds are then divided by their number."""
        weight_moments.clear()
        self.hidden.grad = self.weight.grad = None
        with xhead.accumulate(self.weight):
            for _ in range(self.micro_batches):
                self.hidden.grad = None
                self._zloss("gram").backward()

    def _zloss(self, engine: str) -> Tensor:
        return get_loss("zloss", engine=engine)(xhead.LazyLogits(self.hidden, self.weight), self.target).mean()

    def _backward(self, loss: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None and self.weight.grad is not None
        return self.hidden.grad, self.weight.grad


def measure_rows(rows: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """A record a way, at this number of rows: seconds of a step, and distance of the gradients from the dense ones."""
    count = options.micro_batches
    step = Step(rows, options.classes, options.width, count, options.seed)
    ways = {
        STOCK: step.stock,
        DENSE: step.dense,
        TILES: step.tiles,
        GRAM: step.gram,
        SHARED.format(count=count): step.accumulated,
    }
    progress(f"N {rows:,}")
    timings = measure.time_interleaved(ways, repeats=options.repeats, report=progress)
    step.dense()
    exact = step.gradients()
    records: list[dict[str, object]] = []
    for name, way in ways.items():
        way()
        share = count if way == step.accumulated else 1
        errors = [_relative_error(mine / each, other) for mine, each, other in _pairs(step, share, exact)]
        records.append({
            "rows": rows,
            "name": name,
            "median": timings[name].median / share,
            "seconds": [value / share for value in timings[name].seconds],
            "hidden_error": None if way == step.stock else errors[0],
            "weight_error": None if way == step.stock else errors[1],
        })  # fmt: skip
    return records


def progress(line: str) -> None:
    print(f"  {line}", flush=True)


def _pairs(step: Step, share: int, exact: tuple[Tensor, Tensor]) -> zip:
    # The hidden states' gradient is that of the last micro-batch, the weight's the sum of all.
    return zip(step.gradients(), (1, share), exact, strict=True)


def _relative_error(value: Tensor, truth: Tensor) -> float:
    return (torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth)).item()


def table(records: list[dict]) -> str:
    """A line a number of rows and way."""
    dense = {record["rows"]: record["median"] for record in records if record["name"] == DENSE}
    stock = {record["rows"]: record["median"] for record in records if record["name"] == STOCK}
    lines = []
    for record in records:
        rows, median = record["rows"], record["median"]
        errors = [record["hidden_error"], record["weight_error"]]
        ratios = [f"{median / stock[rows]:.2f}", f"{median / dense[rows]:.2f}"]
        shown = ["-" if error is None else f"{error:.1e}" for error in errors]
        lines.append([record["name"], f"{rows:,}", f"{median:.3f}", *ratios, *shown])
    columns = ["step", "N", "seconds", "x cross-entropy", "x Z-loss built", "hidden error", "weight error"]
    return markdown_table(columns, lines)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spherical_losses", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 4096], help="N (default %(default)s)")
    parser.add_argument("--classes", type=int, default=32_768, help="V (default %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="D (default %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=8, help="in one accumulation (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "spherical_losses.json")
    options = parser.parse_args(arguments)
    shape = {"V": options.classes, "D": options.width, "micro_batches": options.micro_batches}
    record: dict[str, object] = {"environment": measure.environment(), "inputs": shape}
    steps = [each for rows in options.rows for each in measure_rows(rows, options)]
    record["steps"] = steps
    print(f"\nV {options.classes:,}, D {options.width}, float32, forward and backward\n\n{table(steps)}\n")
    save_json(options.output, record)
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
