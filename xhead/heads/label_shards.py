"""Tensors with a row a label, saved by each process that holds some of the rows, and read by any number of others.

A save is a folder with a file for every range of labels; whoever reads takes the rows it wants from all of them.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_NAME = re.compile(r"labels-(\d+)-(\d+)-of-(\d+)\.safetensors")


def save_label_rows(folder: Path, tensors: Mapping[str, Tensor], start: int, stop: int, labels: int) -> None:
    """Write the rows of the labels `[start, stop)` of `labels`; nothing for an empty range.

    All processes write into one folder, which held no other save before.

    tensors: each (stop - start, ...). Raises ValueError for another number of rows.
    """
    for name, tensor in tensors.items():
        if tensor.shape[:1] != (stop - start,):
            raise ValueError(f"{name} must have the rows of the labels [{start}, {stop}), got {tuple(tensor.shape)}")
    if start == stop:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"labels-{start:09d}-{stop:09d}-of-{labels:09d}.safetensors"
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, unfinished)
    os.replace(unfinished, path)


def load_label_rows(folder: Path, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
    """The rows of the labels `[start, stop)`, or of all, on the CPU: by name, each (stop - start, ...).

    For an empty range, tensors without rows.

    Raises ValueError where the folder's files are not all labels, once each, or the range is not within them.
    """
    pieces = sorted(
        (*map(int, match.groups()), path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))
    )
    ranges = [piece[:2] for piece in pieces]
    totals = {labels for _, _, labels, _ in pieces}
    ends = [0, *(end for _, end in ranges)]
    if len(totals) != 1 or [begin for begin, _ in ranges] != ends[:-1] or ends[-1] not in totals:
        shown = ", ".join(path.name for *_, path in pieces) or "no such file"
        raise ValueError(
            f"{folder} must hold labels-START-STOP-of-LABELS.safetensors for all labels without gap or overlap, as one "
            f"save of all processes writes them, got {shown}"
        )
    labels = ends[-1]
    stop = labels if stop is None else stop
    if not 0 <= start <= stop <= labels:
        raise ValueError(f"the range must lie within the {labels} labels of {folder}, got [{start}, {stop})")
    found: dict[str, list[Tensor]] = {}
    for begin, end, _, path in pieces:
        first, last = max(start - begin, 0), min(stop, end) - begin
        if first >= last and begin:
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                # Of the first file even no row, which tells the shapes.
                rows = file.get_slice(name)[first:last] if first < last else file.get_slice(name)[0:0]
                found.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}
