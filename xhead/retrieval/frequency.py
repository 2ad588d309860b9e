"""Where a ranking is right: metrics by how often labels occur in training.

Labels that occur in training are sorted by frequency and cut into groups of equal size; those that never occur are a
group of their own, which comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from xhead.retrieval.metrics import Ranking
from xhead.retrieval.propensity import label_counts


@dataclass(frozen=True)
class Group:
    """Labels of similar frequency.

    Attributes:
        labels: how many they are.
        fewest, most: how often they occur in training, from and to.
        truths: how many entries of the test truth they are.
        precision: their part of P@k; over all groups these add up to P@k.
        recall: the share of their truths that are predicted within k ranks; None where they have no truth.
    """

    labels: int
    fewest: int
    most: int
    truths: int
    precision: float
    recall: float | None


def by_frequency(
    ranking: Ranking,
    train_labels: csr_matrix,  # (training documents, labels)
    k: int = 5,
    groups: int = 10,
) -> list[Group]:
    """Break P@k and micro-averaged recall@k down by label frequency.

    Args:
        ranking: what `xhead.retrieval.metrics.rank` gives.
        train_labels: the label matrix of training.
        k: ranks that count.
        groups: how many groups the labels that occur in training make; equally frequent ones are split by their index.

    Returns:
        The group of labels that never occur in training, then the others, the rarest first. Groups may be empty.

    Raises:
        ValueError: k or groups out of range.
    """
    if not 1 <= k <= ranking.predicted.shape[1] or groups < 1:
        raise ValueError(
            f"k = {k}, groups = {groups}; k must be from 1 to {ranking.predicted.shape[1]}, and groups 1 or more"
        )
    counts = label_counts(train_labels)
    order = np.argsort(counts, kind="stable")
    unseen = int((counts == 0).sum())
    members = [order[:unseen], *np.array_split(order[unseen:], groups)]
    group_of = np.empty(len(counts), np.int64)
    for number, labels in enumerate(members):
        group_of[labels] = number
    predicted, hits = ranking.predicted[:, :k], ranking.hits[:, :k]
    found = np.bincount(group_of[predicted[hits]], minlength=len(members))
    truths = np.bincount(group_of[ranking.truth.indices], minlength=len(members))
    places = max(predicted.size, 1)
    return [
        Group(
            labels=len(labels),
            fewest=int(counts[labels].min()) if len(labels) else 0,
            most=int(counts[labels].max(initial=0)),
            truths=int(truths[number]),
            precision=float(found[number] / places),
            recall=float(found[number] / truths[number]) if truths[number] else None,
        )
        for number, labels in enumerate(members)
    ]
