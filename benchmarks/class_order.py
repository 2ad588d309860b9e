"""`python -m benchmarks.class_order`: how many tiles a filtered backward visits, for several orders of the classes.

A tile is visited where any of its rows gives any of its classes a probability of at least the threshold. Each order is
made from one half of the rows, as a running training would have it, and counted on the other. `--inputs` is a file of a
trained model's hidden states and weight (`recipes.one_billion_word` writes one); otherwise they are synthetic.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import inputs as head_inputs
from benchmarks import measure
from benchmarks.report import RESULTS, markdown_table, save_json

TILES = {"128 x 256": (128, 256), "128 x 128": (128, 128)}


def orders_of(probabilities: Tensor, weight: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Orders by name, each (V,), from the rows of an earlier batch. probabilities: (N, V)"""
    largest_first = {
        "mean logit": weight @ hidden.mean(0),
        "mean probability": probabilities.mean(0),
        "largest probability": probabilities.amax(0),
    }
    numbered = torch.arange(weight.shape[0])
    return {"as numbered": numbered} | {
        name: value.argsort(descending=True, stable=True) for name, value in largest_first.items()
    }


def visited(kept: Tensor, order: Tensor, height: int, width: int) -> float:
    """The share of tiles with a kept entry; those that the edges cut are left out. kept: (N, V) bool"""
    rows, classes = (size // step * step for size, step in zip(kept.shape, (height, width), strict=True))
    tiles = kept[:rows, order[:classes]].view(rows // height, height, classes // width, width)
    return float(tiles.any(3).any(1).float().mean())


def count(hidden: Tensor, weight: Tensor, exponents: list[int]) -> list[dict[str, object]]:
    """A record a threshold and order: the share of tiles visited, for each size of tile."""
    before, now = hidden[0::2], hidden[1::2]
    orders = orders_of((before @ weight.T).softmax(1), weight, before)
    probabilities = (now @ weight.T).softmax(1)
    records = []
    for exponent in exponents:
        kept = probabilities >= 2.0**-exponent
        entries = float(kept.float().mean())
        for name, order in orders.items():
            shares = {tile: visited(kept, order, *size) for tile, size in TILES.items()}
            records.append({"exponent": exponent, "order": name, "entries": entries, "tiles": shares})
    return records


def order_table(records: list[dict]) -> str:
    rows = [
        [
            f"2^-{record['exponent']}",
            f"{record['entries']:.3%}",
            record["order"],
            *(f"{record['tiles'][tile]:.1%}" for tile in TILES),
        ]
        for record in records
    ]
    return markdown_table(["threshold", "entries kept", "order by", *(f"tiles of {tile}" for tile in TILES)], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    description = "Tiles that a filtered backward visits, for several orders of the classes."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.class_order", description=description)
    head_inputs.add_arguments(parser, rows=4096, classes=16384, width=256)
    parser.add_argument("--exponents", type=int, nargs="+", default=[8, 10, 12], help="thresholds are 2 to minus these")
    parser.add_argument("--output", type=Path, default=RESULTS / "class_order.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    inputs = head_inputs.from_arguments(options)
    softmax = head_inputs.softmax_of(inputs)
    record: dict[str, object] = {
        "environment": measure.environment(),
        "inputs": head_inputs.record_of(inputs, softmax),
        "orders": count(inputs.hidden, inputs.weight, options.exponents),
    }
    print(f"{inputs.source}: {inputs.shape}\n\n{order_table(record['orders'])}\n")  # type: ignore[arg-type]
    save_json(options.output, record)
    print(f"written: {options.output}")
    return record


if __name__ == "__main__":
    main()
