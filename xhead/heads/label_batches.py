"""Which labels and which queries make up a batch: negatives at random and by exact search, and batches of near queries.

The searches are over vectors of some epochs ago: refresh them every few epochs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xhead.retrieval import topk
from xhead.vocabulary import Vocabulary


class Candidates(NamedTuple):
    """Some of the labels, and the right ones of each query among them."""

    index: Tensor  # (B,) sorted labels
    labels: Tensor  # (n, K) positions in `index`, -1 for none


def candidates(labels: Tensor, negatives: Tensor) -> Candidates:
    """The labels of a batch: every right label of its queries, and the negatives given.

    labels: (n, K), -1 for none; negatives: any shape, -1 for none
    """
    wanted = torch.cat([labels.flatten(), negatives.flatten()])
    index = wanted[wanted >= 0].unique()
    places = torch.searchsorted(index, labels.clamp(min=0))
    return Candidates(index, torch.where(labels >= 0, places, -1))


def random_negatives(count: int, labels: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) of the labels `[0, labels)`, each equally likely, with repeats."""
    return torch.randint(labels, (count,), generator=generator)


@torch.no_grad()
def hard_negatives(
    queries: Tensor,  # (n, D)
    vectors: Tensor,  # (L, D)
    labels: Tensor,  # (n, K), -1 for none
    k: int,
    *,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """The k labels of the largest `query . vector` that are not right, exact: (n, k), -1 where there are fewer.

    vocabulary: processes share the labels; `vectors` are those of this process, and all of them get the same answer.

    Source: ANCE (arXiv 2007.00808); from a shortlist as in DEXML (arXiv 2310.10636).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count = vectors.shape[0] if vocabulary is None else vocabulary.classes
    best = topk(queries, vectors, min(k + labels.shape[1], count), vocabulary=vocabulary).classes
    right = (best[:, :, None] == labels[:, None, :]).any(-1)
    # A stable sort brings what is wrong to the front and keeps its order.
    order = right.to(torch.uint8).sort(dim=1, stable=True).indices[:, :k]
    found = best.gather(1, order).masked_fill(right.gather(1, order), -1)
    return torch.nn.functional.pad(found, (0, k - found.shape[1]), value=-1)


def drawn_negatives(shortlist: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """(n, count) of each query's shortlist, each equally likely and none twice; -1 where there are fewer.

    shortlist: (n, S), -1 for none, as `hard_negatives` gives it
    """
    keys = torch.rand(shortlist.shape, generator=generator).to(shortlist.device)
    first = keys.masked_fill(shortlist < 0, -1.0).topk(min(count, shortlist.shape[1]), dim=1).indices
    found = shortlist.gather(1, first)
    return torch.nn.functional.pad(found, (0, count - found.shape[1]), value=-1)


def clustered_batches(
    vectors: Tensor,  # (n, D)
    batch: int,
    *,
    cluster: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Batches of near queries, whose labels are hard negatives of one another: index tensors, each query once.

    The queries are halved again and again, at the median along the line between the means of the two halves, until a
    part has at most `cluster` of them (default: batch / 8, at least 2); the parts, in a random order, fill the batches.

    Source: NGAME (arXiv 2207.04452), whose clusters are balanced too.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    size = max(2, batch // 8) if cluster is None else cluster
    parts = _halved(vectors, torch.randperm(vectors.shape[0], generator=generator), max(size, 1))
    order = torch.randperm(len(parts), generator=generator).tolist()
    if parts:
        yield from torch.cat([parts[place] for place in order]).split(batch)


_ROUNDS = 4  # means and halves settle within a few


def _halved(vectors: Tensor, index: Tensor, size: int) -> list[Tensor]:
    if index.shape[0] <= size:
        return [index] if index.shape[0] else []
    members = vectors[index].float()
    # The order is random: the difference of the first two is a random direction.
    direction = members[0] - members[1]
    middle = index.shape[0] // 2
    for _ in range(_ROUNDS):
        order = (members @ direction).argsort()
        direction = members[order[middle:]].mean(0) - members[order[:middle]].mean(0)
    order = (members @ direction).argsort()
    return _halved(vectors, index[order[:middle]], size) + _halved(vectors, index[order[middle:]], size)
