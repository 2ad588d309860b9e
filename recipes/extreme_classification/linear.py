"""The opponent that a neural model must beat: one linear classifier a label on bags of words.

    shortlist      the labels with the largest cosine between a document and the label's centroid: the mean of its
                   training documents and of its own text, cut to its largest features; and the most frequent labels
    classifiers    L2-regularised squared hinge, one against the hard rest: the positives of a label and its text
                   against documents that have it in their shortlist, and a few random ones
    score          a sum of the classifier's output o, of -max(1 - o, 0)^2, of the logarithms of that cosine and of the
                   label's frequency, weighted by a logistic regression on held-out training documents

So a label that never occurs in training can be predicted by its text. Hard negatives by a shortlist are those of Slice
(WSDM 2019), small weights are dropped as in DiSMEC (arXiv 1609.02521).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix, vstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from tqdm import tqdm

from recipes.common.command_line import parse
from recipes.common.errors import RecipeError
from recipes.extreme_classification.evaluation import Clock, measure, ranks_needed, write_evaluation
from recipes.extreme_classification.features import Features, largest, make_features
from recipes.extreme_classification.options import DataOptions, load_data
from xhead.retrieval.metrics import Ranking
from xhead.retrieval.propensity import label_counts

HELD_OUT = 2_000  # training documents at most, kept for the weights of the evidence
BLOCK = 512  # documents scored at a time: (BLOCK, labels) numbers in memory


@dataclass
class LinearOptions:
    """The classifiers."""

    output_dir: str = field(default="runs/extreme_classification_linear", metadata={"help": "For the report."})
    characters: int = field(default=5, metadata={"help": "Length of character n-grams as features; 0 for none."})
    centroid_features: int = field(default=200, metadata={"help": "Keep so many features of a label's centroid."})
    negatives: int = field(default=50, metadata={"help": "A training document is a negative of so many labels."})
    cost: float = field(default=1.0, metadata={"help": "C of the support vector machines."})
    smallest_weight: float = field(default=0.02, metadata={"help": "Smaller weights of a classifier are dropped."})
    seed: int = field(default=0, metadata={"help": "For the random negatives."})

    def __post_init__(self) -> None:
        for name, minimum in (("characters", 0), ("centroid_features", 1), ("negatives", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise RecipeError(f"--{name} is {getattr(self, name)}; it must be at least {minimum}")
        if not self.cost > 0 or self.smallest_weight < 0:
            raise RecipeError(f"--cost is {self.cost}, --smallest_weight {self.smallest_weight}; they must be positive")


def run(name: str, arguments: list[str]) -> dict[str, Any]:
    """Train, predict, report; the model is called by `name` there.

    Returns:
        What is written to results.json.

    Raises:
        RecipeError: an option or the data cannot be used.
    """
    program = f"python -m recipes.extreme_classification --model {name}"
    data, options = parse(
        (DataOptions, LinearOptions), program, "Train and measure a linear classifier a label.", {}, arguments
    )
    splits = load_data(data)
    clock = Clock()
    features = make_features(splits, options.characters)
    model = LinearModel(features, splits.train.labels, options)
    predictions = model.predict(features.test, ranks_needed(splits))
    return write_evaluation(
        measure(splits, predictions), Path(options.output_dir), model=name, options=asdict(options), clock=clock
    )


class LinearModel:
    """Centroids, classifiers, and the weights of what they say.

    Args:
        features: of training documents and labels.
        labels: the label matrix of training, (documents, labels).
        options: how.

    Raises:
        RecipeError: too few documents to hold some out.
    """

    def __init__(self, features: Features, labels: csr_matrix, options: LinearOptions) -> None:
        documents, label_count = labels.shape  # pyright: ignore
        if documents < 20:
            raise RecipeError(f"{documents} training documents; one in 20 is held out, so that 20 or more are needed")
        shuffled = np.random.default_rng(options.seed).permutation(documents)
        held = np.sort(shuffled[: min(documents // 20, HELD_OUT)])
        kept = np.sort(shuffled[len(held) :])
        known = csr_matrix(labels[kept])
        fitted = Features(csr_matrix(features.train[kept]), features.test, features.labels)
        self._counts = label_counts(known)
        sums = known.astype(bool).astype(np.float32).T @ fitted.train + fitted.labels
        self._centroids = largest(csr_matrix(normalize(csr_matrix(sums))), options.centroid_features)
        nearest, _ = self._shortlist(fitted.train, min(options.negatives, label_count))
        self._weights, self._biases = _classifiers(fitted, known, nearest, options)
        self._mix = self._fit_mix(csr_matrix(features.train[held]), csr_matrix(labels[held]), min(100, label_count))

    def predict(self, documents: csr_matrix, k: int) -> np.ndarray:
        """The k best labels of each document, the best first: (documents, k)."""
        shortlist, evidence = self._evidence(documents, k)
        order = np.argsort(-(evidence @ self._mix), axis=1, kind="stable")
        return np.take_along_axis(shortlist, order, axis=1)

    def _fit_mix(self, documents: csr_matrix, labels: csr_matrix, k: int) -> np.ndarray:
        """The weights of a logistic regression on documents that nothing else was fitted to."""
        shortlist, evidence = self._evidence(documents, k)
        right = Ranking(shortlist, labels).hits
        if right.all() or not right.any():
            raise RecipeError(
                f"{len(right)} held-out documents have all or none of their shortlisted labels: too few data"
            )
        regression = LogisticRegression(max_iter=200).fit(evidence.reshape(-1, evidence.shape[2]), right.ravel())
        return regression.coef_[0]

    def _evidence(self, documents: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Shortlisted labels (documents, k), and what speaks for each of them, (documents, k, 4)."""
        shortlist, cosines = self._shortlist(documents, k)
        outputs = np.zeros(shortlist.shape)
        for part in _blocks(documents, "classifying"):
            outputs[part] = np.take_along_axis((documents[part] @ self._weights.T).toarray(), shortlist[part], axis=1)
        outputs += self._biases[shortlist]
        hinge = -(np.maximum(1 - outputs, 0) ** 2)
        frequency = np.log1p(self._counts)[shortlist]
        return shortlist, np.stack([outputs, hinge, np.log(np.maximum(cosines, 1e-3)), frequency], axis=2)

    def _shortlist(self, documents: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The most frequent labels and those whose centroids are nearest, and their cosines: (documents, k) both."""
        found = []
        transposed = csr_matrix(self._centroids.T)
        frequent = np.argsort(-self._counts, kind="stable")[: k // 4]
        for part in _blocks(documents, "shortlists"):
            scores = (documents[part] @ transposed).toarray()
            cosines = scores[:, frequent].copy()
            scores[:, frequent] = -1  # each label once
            nearest = np.argpartition(-scores, k - len(frequent) - 1, axis=1)[:, : k - len(frequent)]
            labels = np.concatenate([np.broadcast_to(frequent, cosines.shape), nearest], axis=1)
            found.append((labels, np.concatenate([cosines, np.take_along_axis(scores, nearest, axis=1)], axis=1)))
        labels, cosines = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return labels, cosines


def _classifiers(
    features: Features, labels: csr_matrix, nearest: np.ndarray, options: LinearOptions
) -> tuple[csr_matrix, np.ndarray]:
    """One classifier a label: weights (labels, F) and biases (labels,)."""
    documents, label_count = labels.shape  # pyright: ignore
    generator = np.random.default_rng(options.seed)
    positives_of = csc_matrix(labels)
    starts = np.arange(0, nearest.size + 1, nearest.shape[1])
    near = csc_matrix(csr_matrix((np.ones(nearest.size, bool), nearest.ravel(), starts), shape=labels.shape))
    samples = csr_matrix(vstack([features.train, features.labels]))
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    biases = np.zeros(label_count)
    for label in tqdm(range(label_count), desc="classifiers", delay=3, disable=None):
        positives = _column(positives_of, label)
        negatives = np.setdiff1d(_column(near, label), positives)
        most = max(200, 10 * len(positives))
        if len(negatives) > most:
            negatives = generator.choice(negatives, most, replace=False)
        random = np.setdiff1d(generator.integers(documents, size=20), positives)
        negatives = np.union1d(negatives, random)
        positives = np.append(positives, documents + label)  # its own text
        weights, biases[label] = _fit(samples[np.concatenate([positives, negatives])], len(positives), options)
        rows.append(weights)
    starts = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return csr_matrix((values, columns, starts), shape=(label_count, samples.shape[1])), biases  # pyright: ignore


def _fit(samples: csr_matrix, positives: int, options: LinearOptions) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Columns and values of a classifier's weights, and its bias; the first rows of the samples are the positives."""
    used, places = np.unique(samples.indices, return_inverse=True)
    rows = samples.shape[0]  # pyright: ignore
    if not len(used) or positives == rows:  # nothing to tell apart
        return (used[:0], np.zeros(0, np.float32)), 1.0
    compact = csr_matrix((samples.data, places, samples.indptr), shape=(rows, len(used)))
    machine = LinearSVC(C=options.cost, tol=0.1, dual=True, random_state=options.seed)  # pyright: ignore
    machine.fit(compact, np.arange(rows) < positives)
    weights = machine.coef_[0]
    kept = np.abs(weights) >= options.smallest_weight
    return (used[kept], weights[kept].astype(np.float32)), float(machine.intercept_[0])  # pyright: ignore


def _column(matrix: csc_matrix, column: int) -> np.ndarray:
    return matrix.indices[matrix.indptr[column] : matrix.indptr[column + 1]]


def _blocks(documents: csr_matrix, what: str) -> Any:
    starts = range(0, documents.shape[0], BLOCK)  # pyright: ignore
    return (slice(start, start + BLOCK) for start in tqdm(starts, desc=what, delay=3, disable=None))
