"""Statistics of logits that are no `cap(scale * (hidden @ weight.T + bias))`, one block of rows after another.

A block's logits live while the block is worked on, forward and, under activation checkpointing, again backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xhead import pointwise
from xhead.statistics import Statistics, row_statistics

BLOCK_BYTES = 64 * 2**20
"""Logits held at a time, in float32."""


def statistics(
    canonical: pointwise.Canonical, weight: Tensor, names: tuple[str, ...], options: dict[str, Any]
) -> Statistics:
    """As `row_statistics(...)`, of the logits that `canonical.rest` makes of the canonical ones."""
    hidden = canonical.hidden  # (..., D)
    rows_shape = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    per_row = {name: options.get(name) for name in ("target", "row_mask", "columns")}
    per_row = {name: _flat_rows(value, len(rows_shape)) for name, value in per_row.items() if value is not None}
    shared = {name: value for name, value in options.items() if name not in ("target", "row_mask", "columns", "engine")}

    def block(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found = row_statistics(
            hidden, weight, names, bias=bias, scale=canonical.scale, softcap=canonical.softcap,
            transform=lambda logits: pointwise.replay(canonical.rest, logits), **rows, **shared,
        )  # fmt: skip
        return tuple(getattr(found, name) for name in names)

    step = max(1, BLOCK_BYTES // (4 * weight.shape[0]))
    blocks = []
    for start in range(0, max(flat.shape[0], 1), step):
        rows = {name: value[start : start + step] for name, value in per_row.items()}
        part = flat[start : start + step]
        blocks.append(checkpoint(block, part, weight, canonical.bias, rows, use_reentrant=False))
    values = {name: torch.cat(parts) for name, parts in zip(names, zip(*blocks, strict=True), strict=True)}
    for name, value in values.items():
        if name != "column_logits":
            values[name] = value.reshape(*rows_shape, *value.shape[1:])
    return Statistics(**values)


def _flat_rows(value: Tensor, dimensions: int) -> Tensor:
    """(...) rows as (N, ...); sparse column sets padded with -1, since they cannot be cut into blocks of rows."""
    if value.layout == torch.strided:
        return value if dimensions == 1 else value.reshape(-1, *value.shape[dimensions:])
    counts, columns = value.crow_indices().diff(), value.col_indices().long()
    place = torch.arange(int(counts.max()) if counts.numel() else 0, device=columns.device)
    padded = columns.new_full((counts.shape[0], place.shape[0]), -1)
    padded[place < counts[:, None]] = columns
    return padded
