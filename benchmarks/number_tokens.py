"""`python -m benchmarks.number_tokens`: what a number token loss adds to cross-entropy, in time and memory, on the CPU.

Forward and backward of `cce` and of `cce+0.3*ntl_was` through xhead's own functions, in turns in one run. The ratio is
the median over the rounds of the time beside that of `cce` in the same round.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xhead
from benchmarks import inputs as head_inputs
from benchmarks import measure
from benchmarks.cpu import progress
from benchmarks.inputs import HeadInputs
from benchmarks.report import RESULTS, markdown_table, megabytes, save_json
from xhead.losses import get_loss

ALONE = "cce"
SUM = "cce+0.3*ntl_was"


def number_tokens(digits: int, classes: int, seed: int) -> dict[str, list]:
    """Tokens for all strings of up to that many digits, anywhere in the vocabulary: `token_ids` and `values`."""
    values = [float(value) for length in range(1, digits + 1) for value in range(10**length)]
    if len(values) > classes:
        raise ValueError(f"{len(values)} numbers of up to {digits} digits are more than the {classes} classes")
    generator = torch.Generator().manual_seed(seed)
    return {"token_ids": torch.randperm(classes, generator=generator)[: len(values)].tolist(), "values": values}


def with_numbers(target: Tensor, token_ids: list[int], share: float, seed: int) -> Tensor:
    """The targets (N,) with a share of them, at random, replaced by number tokens."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(target), generator=generator)[: round(share * len(target))]
    drawn = torch.randint(len(token_ids), chosen.shape, generator=generator)
    return target.index_copy(0, chosen, torch.tensor(token_ids)[drawn])


class Training:
    """Forward and backward of a loss; the gradients stay until the next call."""

    def __init__(self, inputs: HeadInputs, target: Tensor) -> None:
        self.hidden, self.weight = (t.clone().requires_grad_() for t in (inputs.hidden, inputs.weight))
        self.target = target

    def reset(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def step(self, loss: Any) -> None:
        self.reset()
        loss(xhead.LazyLogits(self.hidden, self.weight), self.target).mean().backward()

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        return self.hidden.grad, self.weight.grad


def measure_sums(inputs: HeadInputs, digits: list[int], share: float, repeats: int, seed: int) -> list[dict[str, Any]]:
    """A record a loss: number tokens, seconds, ratios to `cce` round by round, memory beyond the gradients."""
    classes = inputs.shape["V"]
    sets = {length: number_tokens(length, classes, seed) for length in digits}
    # The same labels for all: those of the smallest set are number tokens of every other.
    target = with_numbers(inputs.target, sets[min(digits)]["token_ids"], share, seed)
    losses: dict[str, tuple[Any, int, bool]] = {ALONE: (get_loss(ALONE), 0, False)}
    for numbers in sets.values():
        for reweigh in (False, True):
            name = f"{SUM}, {len(numbers['values'])} tokens{', reweigh' if reweigh else ''}"
            losses[name] = get_loss(SUM, reweigh=reweigh, **numbers), len(numbers["values"]), reweigh
    training = Training(inputs, target)
    timings = measure.time_interleaved(
        {name: partial(training.step, loss) for name, (loss, _, _) in losses.items()}, repeats=repeats, report=progress
    )
    records = []
    for name, (loss, tokens, reweigh) in losses.items():
        ratios = [own / base for own, base in zip(timings[name].seconds, timings[ALONE].seconds, strict=True)]
        training.reset()
        _, beyond = measure.peak_allocated(partial(training.step, loss), training.gradients)
        records.append(
            {
                "name": SUM if tokens else ALONE,
                "number_tokens": tokens,
                "reweigh": reweigh,
                **timings[name].summary(),
                "ratios": ratios,
                "ratio": statistics.median(ratios),
                "beyond_gradients": beyond,
            }
        )
    return records


def overhead_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        ratio = [f"{record['ratio']:.3f}", f"{min(record['ratios']):.3f} to {max(record['ratios']):.3f}"]
        options = ", `reweigh=True`" if record["reweigh"] else ""
        name, tokens = f"`{record['name']}`{options}", record["number_tokens"] or "-"
        rows.append([name, tokens, f"{record['median']:.3f}", *ratio, megabytes(record["beyond_gradients"])])
    return markdown_table(["loss", "number tokens", "seconds", "x cce", "of the rounds", "MB beyond gradients"], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    description = "What a number token loss adds to cross-entropy, on the CPU."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.number_tokens", description=description)
    head_inputs.add_arguments(parser, rows=2048, classes=50257, width=768)
    parser.add_argument(
        "--digits", type=int, nargs="+", default=[1, 3], help="number tokens are all numbers of up to so many digits"
    )
    parser.add_argument("--share", type=float, default=0.2, help="of the labels that are numbers (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "number_tokens.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    inputs = head_inputs.from_arguments(options)
    softmax = head_inputs.softmax_of(inputs)
    record: dict[str, object] = {
        "environment": measure.environment(),
        "inputs": head_inputs.record_of(inputs, softmax),
        "number_share": options.share,
    }
    print(f"{record['environment']}\n\n{inputs.source}: {inputs.shape}, {inputs.hidden.dtype}\n")
    records = measure_sums(inputs, options.digits, options.share, options.repeats, options.seed)
    record["losses"] = records
    print(f"\n{overhead_table(records)}\n")
    save_json(options.output, record)
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
