"""`python -m benchmarks.cpu`: time, memory and gradient error of the cross-entropy over a large vocabulary, on the CPU.

Three tables, each with every side measured in turns in one run:
training (forward and backward), forward alone beside the bare GEMM, and training at random initialisation.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

import xhead
from benchmarks import inputs as head_inputs
from benchmarks import measure
from benchmarks.inputs import HeadInputs
from benchmarks.report import RESULTS, markdown_table, megabytes, power_of_two, save_json

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, target) -> loss

STOCK = "F.cross_entropy(F.linear)"
CHUNKED = "F.linear_cross_entropy, chunked"


def stock(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def torch_chunked() -> Loss | None:
    """torch's own loss that never holds all logits; None in versions before it had one."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    return None if options is None else partial(F.linear_cross_entropy, options=options())


def xhead_loss(**options: object) -> Loss:
    """`xhead.linear_cross_entropy` with these options, which returns the loss alone."""
    return cast(Loss, partial(xhead.linear_cross_entropy, **options))


def xhead_losses(thresholds: list[float | None], *, dropped: float | None) -> dict[str, Loss]:
    """The losses to measure by name: each threshold with compensation, and one that drops what it skips."""
    losses: dict[str, Loss] = {}
    for eps in thresholds:
        losses[f"xhead, filter {power_of_two(eps)}"] = xhead_loss(filter_eps=eps)
    if dropped:
        losses[f"xhead, filter {power_of_two(dropped)}, dropped"] = xhead_loss(filter_eps=dropped, compensate=False)
    return losses


class Training:
    """Forward and backward of a loss on fixed inputs; the gradients stay until the next call."""

    def __init__(self, inputs: HeadInputs) -> None:
        self.hidden = inputs.hidden.clone().requires_grad_()
        self.weight = inputs.weight.clone().requires_grad_()
        self.target = inputs.target

    def reset(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def step(self, loss: Loss) -> None:
        self.reset()
        loss(self.hidden, self.weight, self.target).backward()

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad


def relative_error(value: Tensor, truth: Tensor) -> float:
    return (torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth)).item()


def measure_training(
    inputs: HeadInputs, losses: dict[str, Loss], repeats: int, *, memory: bool
) -> list[dict[str, object]]:
    """A record a loss: seconds, memory beyond the gradients, and the gradients' distance from the first loss's."""
    training = Training(inputs)
    timings = measure.time_interleaved(
        {name: partial(training.step, loss) for name, loss in losses.items()}, repeats=repeats, report=progress
    )
    truth: tuple[Tensor, Tensor] | None = None
    records: list[dict[str, object]] = []
    for name, loss in losses.items():
        training.step(loss)
        gradients = training.gradients()
        truth = gradients if truth is None else truth
        record: dict[str, object] = {
            "name": name,
            **timings[name].summary(),
            "hidden_error": relative_error(gradients[0], truth[0]),
            "weight_error": relative_error(gradients[1], truth[1]),
        }
        del gradients
        if memory:
            peak = measure.peak_memory(partial(training.step, loss), results=training.gradients, reset=training.reset)
            record |= {"allocated": peak.allocated, "beyond_gradients": peak.beyond, "resident": peak.resident}
        records.append(record)
    return records


def measure_forward(inputs: HeadInputs, losses: dict[str, Loss], repeats: int) -> list[dict[str, object]]:
    """The bare GEMM into a buffer that is there, then each loss: without a gradient, and as the start of a backward."""
    hidden, weight, target = inputs.hidden, inputs.weight, inputs.target
    buffer = hidden.new_empty(hidden.shape[0], weight.shape[0])
    differentiable = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())

    def without_gradient(loss: Loss) -> Tensor:
        with torch.no_grad():
            return loss(hidden, weight, target)

    def with_gradient(loss: Loss) -> Tensor:
        return loss(*differentiable, target)

    callables: dict[str, Callable[[], object]] = {"bare GEMM": lambda: torch.mm(hidden, weight.T, out=buffer)}
    for name, loss in losses.items():
        callables[f"{name}, no gradient"] = partial(without_gradient, loss)
        callables[f"{name}, before a backward"] = partial(with_gradient, loss)
    timings = measure.time_interleaved(callables, repeats=repeats, report=progress)
    return [{"name": name, **timing.summary()} for name, timing in timings.items()]


def training_table(records: list[dict], logits_bytes: int) -> str:
    base = {record["name"]: record["median"] for record in records}
    rows = []
    for record in records:
        row = [record["name"], f"{record['median']:.3f}"]
        row += [f"{record['median'] / base[name]:.2f}" if name in base else "-" for name in (STOCK, CHUNKED)]
        row += [f"{record['hidden_error']:.2e}", f"{record['weight_error']:.2e}"]
        beyond = record.get("beyond_gradients")
        row += [megabytes(beyond), "-" if beyond is None else share_of(beyond, logits_bytes)]
        row += [megabytes(record.get("resident"))]
        rows.append(row)
    columns = ["loss", "seconds", "x stock", "x chunked", "hidden error", "weight error"]
    return markdown_table([*columns, "MB beyond gradients", "of the logits", "MB resident, with gradients"], rows)


def share_of(part: float, whole: float) -> str:
    return f"{part / whole:.1f} x" if part > whole else f"1/{whole / max(part, 1):.0f}"


def forward_table(records: list[dict]) -> str:
    gemm = records[0]["median"]
    rows = [[record["name"], f"{record['median']:.3f}", f"{record['median'] / gemm:.2f}"] for record in records]
    return markdown_table(["forward", "seconds", "x GEMM"], rows)


def progress(line: str) -> None:
    print(f"  {line}", flush=True)


def exponent(text: str) -> float | None:
    """`12` is 2^-12; `off` is no filter."""
    return None if text == "off" else 2.0 ** -abs(float(text))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    description = "Time, memory and gradient error of the cross-entropy over a large vocabulary, on the CPU."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=description)
    head_inputs.add_arguments(parser, rows=2048, classes=50257, width=768)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default %(default)s)")
    parser.add_argument(
        "--filters",
        type=exponent,
        nargs="+",
        default=[None, 2.0**-28, 2.0**-12, 2.0**-10, 2.0**-8],
        help="filter thresholds as exponents: 12 is 2^-12; off is the exact gradient (default: off 28 12 10 8)",
    )
    tables = ["training", "forward", "random"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    inputs = head_inputs.from_arguments(options)
    shape = inputs.shape
    logits_bytes = shape["N"] * shape["V"] * inputs.hidden.element_size()
    softmax = head_inputs.softmax_of(inputs)
    record: dict[str, object] = {
        "environment": measure.environment(),
        "inputs": head_inputs.record_of(inputs, softmax),
        "logits_bytes": logits_bytes,
    }
    print(
        f"{record['environment']}\n\n{inputs.source}: {shape}, {inputs.hidden.dtype}, "
        f"logits {logits_bytes / 1e6:.0f} MB"
    )
    print(f"{head_inputs.describe(softmax)}\n")

    ours = xhead_losses(options.filters, dropped=2.0**-12)
    chunked = torch_chunked()
    torch_losses: dict[str, Loss] = {STOCK: stock} | ({} if chunked is None else {CHUNKED: chunked})
    if "training" in options.tables:
        record["training"] = measure_training(inputs, torch_losses | ours, options.repeats, memory=True)
        print(f"\nForward and backward, {inputs.source}\n\n{training_table(record['training'], logits_bytes)}\n")
    if "forward" in options.tables:
        default = {"xhead": xhead_loss()}
        record["forward"] = measure_forward(inputs, {"stock": stock, **default}, options.repeats)
        print(f"\nForward, {inputs.source}\n\n{forward_table(record['forward'])}\n")
    if "random" in options.tables:
        start = head_inputs.random_initialisation(shape["N"], shape["V"], shape["D"], seed=options.seed)
        record["random"] = measure_training(start, {STOCK: stock, **ours}, options.repeats, memory=False)
        print(f"\nForward and backward, {start.source}\n\n{training_table(record['random'], logits_bytes)}\n")
    save_json(options.output, record)
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
