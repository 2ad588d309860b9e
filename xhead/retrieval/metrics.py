"""Metrics of rankings over very many labels, plain and propensity-scored.

With y_i the labels of document i, y_ir = 1 where the label predicted at rank r = 1, 2, ... is among them, and
w_l = 1/p_l (`xhead.retrieval.propensity`):

    P@k       mean_i 1/k sum_{r<=k} y_ir
    recall@k  mean_i 1/|y_i| sum_{r<=k} y_ir
    nDCG@k    mean_i (sum_{r<=k} y_ir / log2(r+1)) / D_i        D_i = sum_{r<=min(k, |y_i|)} 1/log2(r+1)
    PSP@k     sum_i sum_{r<=k} w y_ir  /  sum_i sum_{r<=k} w*_ir
    PSnDCG@k  sum_i (sum_{r<=k} w y_ir / log2(r+1)) / D_i  /  sum_i (sum_{r<=k} w*_ir / log2(r+1)) / D_i

where w*_ir is the r-th largest w_l of the labels of i, 0 beyond them: propensity-scored metrics are ratios of means,
as they are published, not means of ratios. A document without labels counts in every mean, with 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from xhead.retrieval.propensity import DEFAULT, inverse_propensity

NAMES = ("P", "nDCG", "PSP", "PSnDCG", "recall")
NONE = -1  # in place of a label, where fewer than k were predicted


@dataclass(frozen=True)
class Ranking:
    """Predictions beside the truth.

    Attributes:
        predicted: int64 (documents, k), labels in the order of their ranks, each once, -1 for none.
        truth: the labels of the documents, (documents, labels); entries that are not zero count.
    """

    predicted: np.ndarray
    truth: csr_matrix

    def __post_init__(self) -> None:
        documents, labels = self.truth.shape  # pyright: ignore
        predicted = self.predicted
        if predicted.ndim != 2 or len(predicted) != documents or predicted.dtype.kind not in "iu":
            raise ValueError(
                f"predictions are {predicted.dtype} {predicted.shape}; they must be whole numbers (documents, k) for "
                f"{documents} documents, or csr scores"
            )
        if predicted.size and not NONE <= predicted.min() <= predicted.max() < labels:
            raise ValueError(
                f"predictions go from {predicted.min()} to {predicted.max()}; labels are 0 to {labels - 1}, and -1 none"
            )
        ordered = np.sort(predicted, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NONE)).any():
            raise ValueError("a label is predicted twice for one document; each may be there once")
        truth = csr_matrix(self.truth, copy=True)
        truth.sum_duplicates()
        truth.eliminate_zeros()
        object.__setattr__(self, "truth", truth)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """|y_i|: int64 (documents,)."""
        return np.diff(self.truth.indptr).astype(np.int64)

    @cached_property
    def hits(self) -> np.ndarray:
        """y_ir: bool (documents, k)."""
        documents, labels = self.truth.shape  # pyright: ignore
        rows = np.repeat(np.arange(documents), self.label_counts)
        right = rows * labels + self.truth.indices  # ascending, since the matrix is canonical
        asked = np.arange(documents)[:, None] * labels + self.predicted
        place = np.minimum(np.searchsorted(right, asked), max(len(right) - 1, 0))
        if not len(right):
            return np.zeros(self.predicted.shape, bool)
        return (right[place] == asked) & (self.predicted != NONE)

    def best(self, weights: np.ndarray, k: int) -> np.ndarray:
        """w*_ir: the k largest weights of a document's labels in descending order, then 0: float64 (documents, k)."""
        rows = np.repeat(np.arange(len(self.predicted)), self.label_counts)
        values = weights[self.truth.indices]
        order = np.lexsort((-values, rows))
        ranks = np.arange(len(rows)) - self.truth.indptr[rows]
        kept = ranks < k
        best = np.zeros((len(self.predicted), k))
        best[rows[kept], ranks[kept]] = values[order][kept]
        return best


def rank(
    predictions: np.ndarray | csr_matrix,  # (documents, k) or (documents, labels)
    truth: csr_matrix,  # (documents, labels)
    filter_pairs: np.ndarray | None = None,  # (pairs, 2)
    k: int | None = None,
) -> Ranking:
    """Bring predictions into one form, without the pairs that a data set filters.

    Args:
        predictions: labels in the order of their ranks, -1 for none; or scores, of which the stored ones are
            predictions, the largest first and equal ones by their label.
        truth: the labels of the documents. Filtering does not change them.
        filter_pairs: document and label, taken out of the predictions; what stood behind moves up. To have k
            left, predict k and the most pairs that one document has.
        k: cut, or fill up with -1, to so many ranks.

    Raises:
        ValueError: predictions do not fit the truth.
    """
    documents, labels = truth.shape  # pyright: ignore
    predicted = predictions if isinstance(predictions, np.ndarray) else _ranked(csr_matrix(predictions))
    ranking = Ranking(predicted, truth)
    if filter_pairs is not None and len(filter_pairs):
        asked = np.arange(documents)[:, None] * labels + predicted
        removed = np.isin(asked, filter_pairs[:, 0] * labels + filter_pairs[:, 1]) | (predicted == NONE)
        moved = np.argsort(removed, axis=1, kind="stable")
        ranking = Ranking(np.take_along_axis(np.where(removed, NONE, predicted), moved, axis=1), truth)
    if k is None:
        return ranking
    missing = max(k - ranking.predicted.shape[1], 0)
    return Ranking(np.pad(ranking.predicted[:, :k], ((0, 0), (0, missing)), constant_values=NONE), truth)


def evaluate(
    ranking: Ranking,
    train_labels: csr_matrix,  # (training documents, labels)
    ks: Sequence[int] = (1, 3, 5),
    constants: tuple[float, float] = DEFAULT,
    recall_ks: Sequence[int] = (10, 100),
) -> dict[str, float]:
    """All metrics of a ranking.

    Args:
        ranking: what `rank` gives.
        train_labels: the label matrix of training, for the propensities.
        ks: ranks for P, nDCG, PSP and PSnDCG.
        constants: A and B of the propensities.
        recall_ks: ranks for recall.

    Returns:
        Shares of 1 by name, as `P@1`.

    Raises:
        ValueError: a k is larger than the number of labels predicted, which would count ranks that nobody filled;
            no document.
    """
    wanted = max([*ks, *recall_ks], default=1)
    predicted = ranking.predicted.shape[1]
    if min([*ks, *recall_ks], default=1) < 1 or wanted > predicted:
        raise ValueError(f"ranks {[*ks, *recall_ks]} are asked for; predictions have 1 to {predicted}")
    if not len(ranking.predicted):
        raise ValueError("no document to measure on")
    weights = inverse_propensity(train_labels, constants)
    found = {f"{name}@{k}": METRICS[name](ranking, weights, k) for name in ("P", "nDCG", "PSP", "PSnDCG") for k in ks}
    return found | {f"recall@{k}": METRICS["recall"](ranking, weights, k) for k in recall_ks}


def precision(ranking: Ranking, weights: np.ndarray, k: int) -> float:
    """P@k."""
    return float(ranking.hits[:, :k].sum(axis=1).mean() / k)


def recall(ranking: Ranking, weights: np.ndarray, k: int) -> float:
    """recall@k."""
    return float((ranking.hits[:, :k].sum(axis=1) / np.maximum(ranking.label_counts, 1)).mean())


def ndcg(ranking: Ranking, weights: np.ndarray, k: int) -> float:
    """nDCG@k."""
    return float((ranking.hits[:, :k] @ _discounts(k) / _ideal(ranking, k)).mean())


def scored_precision(ranking: Ranking, weights: np.ndarray, k: int) -> float:
    """PSP@k; `weights` are the inverse propensities (labels,)."""
    return _ratio(_weighted(ranking, weights, k).sum(), ranking.best(weights, k).sum())


def scored_ndcg(ranking: Ranking, weights: np.ndarray, k: int) -> float:
    """PSnDCG@k; `weights` are the inverse propensities (labels,)."""
    ideal = _ideal(ranking, k)
    found, best = (
        (values @ _discounts(k) / ideal).sum() for values in (_weighted(ranking, weights, k), ranking.best(weights, k))
    )
    return _ratio(found, best)


METRICS = dict(zip(NAMES, (precision, ndcg, scored_precision, scored_ndcg, recall), strict=True))


def _weighted(ranking: Ranking, weights: np.ndarray, k: int) -> np.ndarray:
    return np.where(ranking.hits[:, :k], weights[ranking.predicted[:, :k]], 0.0)


def _discounts(k: int) -> np.ndarray:
    return 1 / np.log2(np.arange(2, k + 2))


def _ideal(ranking: Ranking, k: int) -> np.ndarray:
    """D_i; for a document without labels, whose gain is 0 anyway, that of one label."""
    return np.cumsum(_discounts(k))[np.clip(ranking.label_counts, 1, k) - 1]


def _ratio(found: float, best: float) -> float:
    return float(found / best) if best else 0.0


def _ranked(scores: csr_matrix) -> np.ndarray:
    """Stored entries by score, the largest first, then by label; rows are filled up with -1."""
    scores.sort_indices()
    counts = np.diff(scores.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((np.negative(scores.data), rows))
    predicted = np.full((len(counts), max(counts.max(initial=0), 1)), NONE, np.int64)
    predicted[rows, np.arange(len(rows)) - scores.indptr[rows]] = scores.indices[order]
    return predicted
