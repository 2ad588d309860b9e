"""Losses over the pairs of a batch, for dual encoders and metric learning: the batch itself is the weight.

Scores are `s_ij = x_i . y_j`, of vectors made unit vectors first (`normalise=True`). They are computed for a block of
rows at a time, forward and again backward, so that memory does not grow with the square of the batch.

Every function here takes `reduction`: `"mean"`, `"sum"` or `"none"` for the rows (n,); an empty batch gives 0. Rows are
float32, or float64 for float64.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xhead.lazy import LazyLogits
from xhead.losses.vectors import check_positive, in_row_blocks, unit
from xhead.replay import BLOCK_BYTES


def siglip(
    hidden: Tensor,  # (n, D)
    other: Tensor,  # (n, D)
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    normalise: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid loss of n pairs, row i of `hidden` with row i of `other`, against all other combinations.

    Row i is `sum_j softplus(-z_ij (scale s_ij + bias))`, with z 1 where i = j and -1 elsewhere.

    Args:
        scale, bias: numbers, or tensors () that are trained with the encoders. The paper trains log(scale).

    Raises RuntimeError for shapes that differ, ValueError for an unknown reduction.

    Source: SigLIP (arXiv 2303.15343).
    """
    hidden, other = _vectors(hidden, normalise), _vectors(other, normalise)
    _check_pairs(hidden, other)

    def block(part: Tensor, index: Tensor) -> Tensor:
        scores = scale * (part @ other.T) + bias
        matching = index[:, None] == torch.arange(other.shape[0], device=index.device)
        return -F.logsigmoid(torch.where(matching, scores, -scores)).sum(-1)

    rows = in_row_blocks(block, (hidden, _index(hidden)), other.shape[0])
    return _reduce(rows, reduction)


def supcon(
    hidden: Tensor,  # (n, D)
    labels: Tensor,  # (n,)
    *,
    temperature: float = 0.07,
    normalise: bool = True,
    reduction: str = "mean",
    engine: str = "auto",
) -> Tensor:
    """Supervised contrastive loss of a batch with itself.

    Row i is `-1/|P_i| sum_{p in P_i} log( exp(s_ip / T) / sum_{a != i} exp(s_ia / T) )`, P_i the others of its label.
    A row without such others is 0 and does not enter the mean.

    Raises RuntimeError for labels of another shape than the rows, ValueError for a temperature or reduction that is
    not allowed.

    Source: arXiv 2004.11362.
    """
    check_positive("temperature", temperature)
    hidden = _vectors(hidden, normalise)
    _check_labels("labels", labels, hidden)
    if hidden.shape[0] < 2:
        return _reduce(0.0 * hidden.sum(-1), reduction)
    found: Any = LazyLogits(hidden, hidden, scale=1 / temperature).statistics(
        "complement_lse", columns=_index(hidden)[:, None], engine=engine
    )
    kinds, kind = torch.unique(labels, return_inverse=True)
    sums = hidden.new_zeros(kinds.shape[0], hidden.shape[1]).index_add(0, kind, hidden)
    positives = torch.bincount(kind)[kind] - 1
    mean_score = (hidden * (sums[kind] - hidden)).sum(-1) / positives.clamp(min=1)
    rows = torch.where(positives > 0, found.complement_lse - mean_score / temperature, 0.0)
    return _reduce(rows, reduction, (positives > 0).sum())


def circle(
    hidden: Tensor,  # (n, D)
    labels: Tensor,  # (n,)
    other: Tensor | None = None,  # (m, D)
    other_labels: Tensor | None = None,  # (m,)
    *,
    scale: float = 80.0,
    margin: float = 0.4,
    detach_weights: bool = False,
    normalise: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Circle loss of a batch with another, or with itself without each row's own place.

    Row i is `softplus( log sum_N exp(scale [s + m]_+ (s - m)) + log sum_P exp(-scale [1 + m - s]_+ (s - 1 + m)) )`,
    with P the vectors of its label and N those of others; 0 where either is empty.

    Args:
        scale, margin: 80 and 0.4 for fine-grained retrieval; 256 and 0.25 for faces.
        detach_weights: take `[s + m]_+` and `[1 + m - s]_+` as constants in the gradient.

    Raises RuntimeError for shapes that do not fit, ValueError for options that are not allowed.

    Source: arXiv 2002.10857.
    """
    check_positive("scale", scale)

    def rows(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        fixed = scores.detach() if detach_weights else scores
        repel = scale * (fixed + margin).clamp(min=0) * (scores - margin)
        attract = -scale * (1 + margin - fixed).clamp(min=0) * (scores - 1 + margin)
        return _softplus(_masked_lse(repel, negative) + _masked_lse(attract, positive))

    return _labelled(rows, hidden, labels, other, other_labels, normalise, reduction)


def multi_similarity(
    hidden: Tensor,  # (n, D)
    labels: Tensor,  # (n,)
    other: Tensor | None = None,  # (m, D)
    other_labels: Tensor | None = None,  # (m,)
    *,
    positive_scale: float = 2.0,
    negative_scale: float = 50.0,
    threshold: float = 0.5,
    normalise: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Multi-similarity loss of a batch with another, or with itself without each row's own place; no pair mining.

    Row i is `1/a log(1 + sum_P exp(-a (s - l))) + 1/b log(1 + sum_N exp(b (s - l)))`, P the vectors of its label and N
    those of others, with a and b the scales and l the threshold.

    Raises RuntimeError for shapes that do not fit, ValueError for options that are not allowed.

    Source: arXiv 1904.06627.
    """
    check_positive("positive_scale", positive_scale)
    check_positive("negative_scale", negative_scale)

    def rows(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        above = scores - threshold
        attract = _softplus(_masked_lse(-positive_scale * above, positive)) / positive_scale
        return attract + _softplus(_masked_lse(negative_scale * above, negative)) / negative_scale

    return _labelled(rows, hidden, labels, other, other_labels, normalise, reduction)


def auc(
    hidden: Tensor,  # (n, D)
    other: Tensor,  # (n, D)
    *,
    scale: float | Tensor = 1.0,
    normalise: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Mann-Whitney loss of n pairs: every matching score against every other one, of other rows too.

    Row i is `mean_{j != k} softplus(scale (s_jk - s_ii))`, over the n (n - 1) scores of what does not belong together.
    The mean of the rows, by log 2, is an upper bound of 1 - AUC. n^3 terms: the time grows so, the memory does not.

    Raises RuntimeError for shapes that differ, ValueError for an unknown reduction.

    Source: the MW loss (arXiv 2510.00137).
    """
    hidden, other = _vectors(hidden, normalise), _vectors(other, normalise)
    _check_pairs(hidden, other)
    count = hidden.shape[0]
    if count < 2:
        return _reduce(0.0 * (hidden * other).sum(-1), reduction)
    matching = scale * (hidden * other).sum(-1)
    at_a_time = min(count, max(1, BLOCK_BYTES // (4 * count)))
    rows_at_a_time = max(1, BLOCK_BYTES // (4 * count * at_a_time))

    def block(matching: Tensor, part: Tensor, index: Tensor) -> Tensor:
        scores = scale * (part @ other.T)
        elsewhere = index[:, None] != torch.arange(count, device=index.device)
        return _softplus(scores[elsewhere] - matching[:, None]).sum(-1)

    index = _index(hidden)
    rows = []
    for some in matching.split(at_a_time):
        total = torch.zeros_like(some)
        for part, places in zip(hidden.split(rows_at_a_time), index.split(rows_at_a_time), strict=True):
            total = total + checkpoint(block, some, part, places, use_reentrant=False)
        rows.append(total / (count * (count - 1)))
    return _reduce(torch.cat(rows), reduction)


def _labelled(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    other: Tensor | None,
    other_labels: Tensor | None,
    normalise: bool,
    reduction: str,
) -> Tensor:
    """`function(scores, positive, negative) -> rows` over blocks of rows, with masks of what they are compared with."""
    if (other is None) != (other_labels is None):
        raise ValueError("other and other_labels go together: give both, or neither for the batch with itself")
    hidden = _vectors(hidden, normalise)
    _check_labels("labels", labels, hidden)
    columns = hidden if other is None else _vectors(other, normalise)
    column_labels = labels if other_labels is None else other_labels
    _check_labels("other_labels", column_labels, columns)
    if columns.shape[-1] != hidden.shape[-1]:
        raise RuntimeError(f"hidden and other must be (n, D) and (m, D), got {_shapes(hidden, columns)}")

    def block(part: Tensor, part_labels: Tensor, index: Tensor) -> Tensor:
        same = part_labels[:, None] == column_labels
        positive = same
        if other is None:
            positive = same & (index[:, None] != torch.arange(columns.shape[0], device=index.device))
        return function(part @ columns.T, positive, ~same)

    return _reduce(in_row_blocks(block, (hidden, labels, _index(hidden)), columns.shape[0]), reduction)


def _vectors(vectors: Tensor, normalise: bool) -> Tensor:
    if vectors.ndim != 2 or not vectors.is_floating_point():
        raise RuntimeError(f"vectors must be floating, of shape (n, D), got {vectors.dtype}, {tuple(vectors.shape)}")
    return unit(vectors) if normalise else vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def _index(vectors: Tensor) -> Tensor:
    return torch.arange(vectors.shape[0], device=vectors.device)


def _masked_lse(values: Tensor, mask: Tensor) -> Tensor:
    """`log sum exp` of a row where the mask is set; -inf where it is nowhere, with gradient 0."""
    return torch.where(mask, values, -math.inf).logsumexp(-1)


def _softplus(values: Tensor) -> Tensor:
    # F.softplus is only its asymptote beyond 20.
    return -F.logsigmoid(-values)


def _reduce(rows: Tensor, reduction: str, count: Tensor | None = None) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction != "mean":
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    return rows.sum() / (max(rows.shape[0], 1) if count is None else count.clamp(min=1))


def _check_pairs(hidden: Tensor, other: Tensor) -> None:
    if hidden.shape != other.shape:
        raise RuntimeError(f"hidden and other must have one shape (n, D), a row a pair, got {_shapes(hidden, other)}")


def _check_labels(name: str, labels: Tensor, vectors: Tensor) -> None:
    if labels.shape != vectors.shape[:1]:
        raise RuntimeError(f"{name} must have shape ({vectors.shape[0]},), one a vector, got {tuple(labels.shape)}")


def _shapes(first: Tensor, second: Tensor) -> str:
    return f"{tuple(first.shape)} and {tuple(second.shape)}"
