"""Targets of a head as (n, K) classes with a value each, from labels in any of the forms that it takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from xhead.statistics import check_range


class Targets(NamedTuple):
    """Of the rows that count: `classes` (n, K), and their `values` (n, K) or None where all are 1; 0 is no target.

    A row names no class twice. kept: (N,) bool, which of all rows these are; None where it is all of them.
    """

    classes: Tensor
    values: Tensor | None
    kept: Tensor | None


def parse_targets(
    labels: Tensor,  # (...) or (..., K) integers, or sparse CSR (N, V)
    values: Tensor | None,  # as labels
    lead: torch.Size,
    classes: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> Targets:
    """Check and normalise labels. Values of a class that a row names twice are added up.

    Raises:
        RuntimeError: shapes or dtypes that do not fit; values beside a sparse tensor, which has its own.
        IndexError: a label outside `[0, classes)` that is not `ignore_index`.
    """
    if labels.layout == torch.sparse_csr:
        if values is not None:
            raise RuntimeError("sparse labels bring their own values: leave values= out")
        labels, values = _padded(labels, lead, classes, ignore_index)
    elif labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RuntimeError(f"labels must be integers, or a sparse CSR tensor (N, V), got {labels.dtype}")
    elif labels.shape == lead:
        labels, values = labels.reshape(-1, 1), _fitting(values, labels)
    elif labels.ndim == len(lead) + 1 and labels.shape[:-1] == lead:
        labels, values = labels.reshape(lead.numel(), labels.shape[-1]), _fitting(values, labels)
    else:
        raise RuntimeError(
            f"labels must be {tuple(lead)}, one class a row, or {(*lead, 'K')}, got shape {tuple(labels.shape)}"
        )
    if labels.shape[1] == 0:
        labels, values = labels.new_full((len(labels), 1), ignore_index), None
    labels = labels.long()
    ignored = labels == ignore_index
    check_range("label", labels[~ignored], classes)
    values = None if values is None else values.reshape(labels.shape).to(dtype)
    kept = None
    if ignored.any():
        kept = ~ignored.all(1)
        values = torch.ones_like(labels, dtype=dtype) if values is None else values
        labels = labels.masked_fill(ignored, 0)[kept]
        values = values.masked_fill(ignored, 0.0)[kept]
        kept = None if kept.all() else kept
    return Targets(*_merged(labels, values, dtype), kept)


def _fitting(values: Tensor | None, labels: Tensor) -> Tensor | None:
    if values is not None and (values.shape != labels.shape or not values.is_floating_point()):
        raise RuntimeError(
            f"values must be floating numbers of shape {tuple(labels.shape)}, one a label, got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    return None if values is None else values.detach()


def _padded(labels: Tensor, lead: torch.Size, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The rows of a sparse tensor, filled up to the longest. (N, V) -> (N, K), (N, K)"""
    if labels.shape != (lead.numel(), classes):
        raise RuntimeError(f"sparse labels must be {(lead.numel(), classes)}, got shape {tuple(labels.shape)}")
    counts = labels.crow_indices().diff()
    width = int(counts.max()) if counts.numel() else 0
    inside = torch.arange(width, device=counts.device) < counts[:, None]
    padded = counts.new_full(inside.shape, ignore_index, dtype=torch.int64)
    values = labels.values().new_zeros(inside.shape)
    padded[inside] = labels.col_indices().long()
    values[inside] = labels.values().detach()
    return padded, values


def _merged(classes: Tensor, values: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """No class twice in a row: the first has the sum of the values, the others 0."""
    if classes.shape[1] < 2:
        return classes, values
    ordered, order = classes.sort(1)
    new = ordered.diff(dim=1) != 0
    if new.all():
        return classes, values
    values = torch.ones_like(classes, dtype=dtype) if values is None else values
    group = torch.nn.functional.pad(new.cumsum(1), (1, 0))
    merged = torch.zeros_like(values).scatter_add_(1, group, values.gather(1, order))
    return torch.zeros_like(classes).scatter_(1, group, ordered), merged
