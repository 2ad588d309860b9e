"""`python -m benchmarks.fourier`: the Fourier head's training loss beside the sum over bins and frequencies.

The direct form builds the complex (rows, bins, frequencies) tensor of the Fourier series and takes cross-entropy over
all bins: at a size where that fits, forward and backward of both are timed in turns. Then ours alone at a large size.
`--preset small` is a check that takes seconds.
"""

import argparse
import copy
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.report import RESULTS, markdown_table, megabytes, save_json
from xhead.heads import FourierHead

# (rows, bins, frequencies) of the comparison, and of ours alone.
PRESETS = {"full": ((256, 512, 64), (2048, 4096, 550)), "small": ((16, 32, 4), (64, 128, 20))}
FLOOR = 1e-5

DIRECT = "sum over bins and frequencies"
BINS = "xhead, all bins"
OURS = "xhead, loss"


def direct_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, num_bins: int) -> Tensor:
    """The mean cross-entropy of `log(q + floor)`, q from the series `1/2 + Re sum_k (c_k / c_0) exp(i k pi x_b)`."""
    real, imaginary = F.linear(hidden, weight, bias).chunk(2, -1)
    a = torch.complex(real, imaginary)
    size = a.shape[-1]
    lags = [(a[:, k:] * a[:, : size - k].conj()).sum(-1) for k in range(size)]
    c = torch.stack(lags, -1)
    centres = -1 + (2 * torch.arange(num_bins, device=a.device) + 1) / num_bins
    waves = torch.exp(1j * math.pi * torch.arange(1, size, device=a.device) * centres.unsqueeze(-1))
    terms = (c[:, None, 1:] / c[:, None, :1]) * waves  # (rows, bins, frequencies)
    density = 0.5 + terms.sum(-1).real
    masses = density / density.sum(-1, keepdim=True)
    return F.cross_entropy((masses + FLOOR).log(), labels)


class Training:
    """Forward and backward on fixed inputs; the gradients stay until the next call."""

    def __init__(self, rows: int, bins: int, frequencies: int, width: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.head = FourierHead(width, bins, frequencies, floor=FLOOR, init_scale=1.0)
        self.hidden = torch.randn(rows, width).requires_grad_()
        self.labels = torch.randint(bins, (rows,))

    def step(self, name: str) -> Tensor:
        self.reset()
        if name == DIRECT:
            linear = self.head.linear
            loss = direct_loss(self.hidden, linear.weight, linear.bias, self.labels, self.head.bins.num_bins)
        elif name == BINS:
            loss = F.cross_entropy(self.head(self.hidden), self.labels)
        else:
            loss = self.head.loss(self.hidden, self.labels).mean()
        loss.backward()
        return loss.detach()

    def exact_gradient(self) -> Tensor:
        """Of the hidden states, in float64 over all bins."""
        hidden = self.hidden.detach().double().requires_grad_()
        F.cross_entropy(copy.deepcopy(self.head).double()(hidden), self.labels).backward()
        assert hidden.grad is not None
        return hidden.grad

    def reset(self) -> None:
        self.hidden.grad = self.head.linear.weight.grad = self.head.linear.bias.grad = None

    def gradients(self) -> list[Tensor | None]:
        return [self.hidden.grad, self.head.linear.weight.grad, self.head.linear.bias.grad]


def measure_losses(training: Training, names: list[str], repeats: int) -> list[dict[str, object]]:
    """A record a loss: seconds, memory beyond the gradients, and how far the hidden gradient is from float64's."""
    timings = measure.time_interleaved(
        {name: partial(training.step, name) for name in names},
        repeats=repeats,
        report=lambda line: print(f"  {line}", flush=True),
    )
    truth = training.exact_gradient()
    records = []
    for name in names:
        loss = training.step(name).item()
        gradient = training.hidden.grad
        assert gradient is not None
        error = (torch.linalg.vector_norm(gradient - truth) / torch.linalg.vector_norm(truth)).item()
        del gradient
        peak = measure.peak_memory(partial(training.step, name), results=training.gradients, reset=training.reset)
        records.append(
            {"name": name, **timings[name].summary(), "loss": loss, "hidden_error": error, "beyond": peak.beyond}
        )
    return records


def fourier_table(part: dict) -> str:
    """The losses of one size, beside the first of them."""
    base = part["losses"][0]
    rows = [
        [
            record["name"],
            f"{1000 * record['median']:.1f}",
            f"{base['median'] / record['median']:.1f}",
            megabytes(record["beyond"]),
            f"{base['beyond'] / record['beyond']:.1f}",
            f"{record['hidden_error']:.1e}",
        ]
        for record in part["losses"]
    ]
    columns = ["loss", "ms", "times faster", "MB beyond gradients", "times smaller", "gradient error"]
    shape = f"{part['rows']:,} rows, {part['bins']:,} bins, {part['frequencies']} frequencies"
    return (
        f"{shape}; the complex terms of the series would be {part['terms_bytes'] / 1e6:,.0f} MB:\n\n"
        f"{markdown_table(columns, rows)}"
    )


def fourier_page(record: dict) -> str:
    return f"{fourier_table(record['compared'])}\n\n{fourier_table(record['large'])}"


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fourier", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--width", type=int, default=512, help="width of the hidden states (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "fourier.json")
    options = parser.parse_args(arguments)
    record: dict[str, object] = {"environment": measure.environment(), "width": options.width}
    for part, shape, names in zip(
        ("compared", "large"), PRESETS[options.preset], ([DIRECT, BINS, OURS], [BINS, OURS]), strict=True
    ):
        rows, bins, frequencies = shape
        found = measure_losses(Training(*shape, options.width, options.seed), names, options.repeats)
        # What the direct form holds at the least.
        terms = rows * bins * frequencies * 8
        measured = {"rows": rows, "bins": bins, "frequencies": frequencies, "terms_bytes": terms, "losses": found}
        record[part] = measured
        print(f"\n{fourier_table(measured)}\n")
    save_json(options.output, record)
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
