"""`python -m benchmarks.vq`: a codebook and the dense projection, at vocabularies of several sizes.

Loss and gradients, and all logits of a few rows, with every side of a size measured in turns; the codebook's loss has
no number that grows with the vocabulary, beside the bias where it is learned.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xhead
from benchmarks import measure
from benchmarks.report import RESULTS, markdown_table, megabytes, save_json
from xhead.heads.vq import VQConfig, VQHead

STOCK, CUT = "dense, stock", "dense, xhead"
Loss = Callable[[Tensor, Tensor], Tensor]  # (hidden, labels) -> mean loss


def heads(classes: int, width: int, codes: int) -> dict[str, VQHead]:
    """Codebooks by name, with a mapping at random; the last has as many rows in two."""
    found = {}
    for token_bias in ("none", "frequency", "learned"):
        head = VQHead(width, classes, VQConfig(codes, start="random", token_bias=token_bias))
        head.remap(torch.randperm(classes) % codes)
        found[f"K = {codes:,}, bias {token_bias}"] = head
    half = codes // 2
    pairs = VQHead(width, classes, VQConfig(half, start="random", token_bias="frequency", residual_size=half))
    cells = torch.randperm(classes)
    pairs.remap(cells % half, cells // half % half)
    found[f"K = {half:,} and S = {half:,}, bias frequency"] = pairs
    return found


def losses_of(dense: nn.Linear, codebooks: dict[str, VQHead]) -> dict[str, tuple[nn.Module, Loss]]:
    """The head that each loss belongs to, and the loss, by name."""

    def stock(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(dense(hidden), labels)

    def cut(hidden: Tensor, labels: Tensor) -> Tensor:
        return xhead.linear_cross_entropy(hidden, dense.weight, labels)

    found: dict[str, tuple[nn.Module, Loss]] = {STOCK: (dense, stock), CUT: (dense, cut)}
    for name, head in codebooks.items():
        found[name] = (head, lambda hidden, labels, head=head: head.loss_rows(hidden, labels).mean())
    return found


def measure_size(rows: int, classes: int, width: int, codes: int, logit_rows: int, repeats: int) -> list[dict]:
    """A record a head: parameters, seconds and bytes of the loss with its gradients, seconds of all logits."""
    torch.manual_seed(0)
    dense = nn.Linear(width, classes, bias=False)
    codebooks = heads(classes, width, codes)
    losses = losses_of(dense, codebooks)
    hidden, labels = torch.randn(rows, width, requires_grad=True), torch.randint(classes, (rows,))
    some = hidden.detach()[:logit_rows]

    def reset(head: nn.Module) -> None:
        hidden.grad = None
        head.zero_grad(set_to_none=True)

    def step(head: nn.Module, loss: Loss) -> None:
        reset(head)
        loss(hidden, labels).backward()
        head.zero_grad(set_to_none=True)  # a dense gradient is large: one at a time

    def kept_step(head: nn.Module, loss: Loss) -> None:
        reset(head)
        loss(hidden, labels).backward()

    @torch.no_grad()
    def logits(head: nn.Module) -> Tensor:
        return head(some)

    steps = {name: partial(step, head, loss) for name, (head, loss) in losses.items()}
    timings = measure.time_interleaved(steps, repeats=repeats)
    calls = {name: partial(logits, head) for name, (head, _) in losses.items() if name != CUT}
    of_logits = measure.time_interleaved(calls, repeats=repeats)
    records = []
    for name, (head, loss) in losses.items():

        def gradients(head: nn.Module = head) -> list[Tensor | None]:
            return [hidden.grad, *(parameter.grad for parameter in head.parameters())]

        peak = measure.peak_memory(partial(kept_step, head, loss), results=gradients, reset=partial(reset, head))
        reset(head)
        records.append(
            {
                "name": name,
                "classes": classes,
                "parameters": sum(parameter.numel() for parameter in head.parameters()),
                **timings[name].summary(),
                "logits": of_logits[name].summary() if name in of_logits else None,
                "allocated": peak.allocated,
                "beyond_gradients": peak.beyond,
            }
        )
        print(f"  V {classes:,}: {name}: {timings[name].median:.4f} s", flush=True)
    return records


def vq_table(records: list[dict]) -> str:
    """Medians, a row a vocabulary and head."""
    columns = ["V", "head", "parameters", "loss and gradients, s", "MB beyond them", "MB in all", "logits, ms"]
    rows = [
        [
            f"{record['classes']:,}",
            record["name"],
            f"{record['parameters']:,}",
            f"{record['median']:.4f}",
            megabytes(record["beyond_gradients"]),
            megabytes(record["allocated"]),
            "-" if record["logits"] is None else f"{1e3 * record['logits']['median']:.1f}",
        ]
        for record in records
    ]
    return markdown_table(columns, rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vq", description="A codebook beside the dense projection, over the vocabulary size."
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--classes", type=int, nargs="+", default=[2**15, 2**18, 2**20])
    parser.add_argument("--logit_rows", type=int, default=16, help="rows whose logits are all built")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="sizes of a few seconds, to see that it works")
    parser.add_argument("--output", type=Path, default=RESULTS / "vq.json")
    options = parser.parse_args(arguments)
    if options.small:
        options.rows, options.codes, options.classes, options.repeats = 128, 256, [2**12, 2**14], 2
    return options


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    shape = {"N": options.rows, "D": options.width, "K": options.codes, "logit_rows": options.logit_rows}
    records = []
    for classes in options.classes:
        records += measure_size(
            options.rows, classes, options.width, options.codes, options.logit_rows, options.repeats
        )
    record: dict[str, object] = {"environment": measure.environment(), "shape": shape, "sizes": records}
    print(f"\n{record['environment']}\n\n{shape}, float32\n\n{vq_table(records)}\n")
    save_json(options.output, record)
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
