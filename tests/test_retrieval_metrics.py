"""Metrics of extreme classification against definitions document by document, and napkinXC where installed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log, log2

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy.sparse import csr_matrix, random_array

from xhead.retrieval.frequency import by_frequency
from xhead.retrieval.metrics import METRICS, Ranking, evaluate, rank
from xhead.retrieval.propensity import inverse_propensity, propensity_constants

DOCUMENTS, LABELS, TRAINING = 120, 40, 300
TOLERANCE = 1e-12


def random_labels(documents: int, seed: int, density: float = 0.06) -> csr_matrix:
    """Some rows are empty, some labels occur nowhere."""
    labels = csr_matrix(random_array((documents, LABELS), density=density, rng=seed))
    labels.data[:] = 1.0
    return labels


@pytest.fixture
def truth() -> csr_matrix:
    return random_labels(DOCUMENTS, 1)


@pytest.fixture
def training() -> csr_matrix:
    labels = random_labels(TRAINING, 2).tolil()
    labels[:, [3, 17]] = 0
    return csr_matrix(labels)


@pytest.fixture
def predicted() -> np.ndarray:
    generator = np.random.default_rng(3)
    found = np.stack([generator.permutation(LABELS)[:15] for _ in range(DOCUMENTS)])
    found[:10, 4:] = -1
    found[5] = -1
    return found


def defined(truth: csr_matrix, lists: Sequence[Sequence[int]], weights: np.ndarray, k: int) -> dict[str, float]:
    """The formulas, one document after the other."""
    sums = dict.fromkeys(("P", "recall", "nDCG", "PSP", "best PSP", "PSnDCG", "best PSnDCG"), 0.0)
    for row, found in enumerate(lists):
        right = set(truth[row].indices)
        if not right:
            continue
        ideal = sum(1 / log2(r + 1) for r in range(1, min(k, len(right)) + 1))
        for r, weight in enumerate(sorted((weights[label] for label in right), reverse=True)[:k], start=1):
            sums["best PSP"] += weight
            sums["best PSnDCG"] += weight / log2(r + 1) / ideal
        for r, label in enumerate(found[:k], start=1):
            if label in right:
                sums["P"] += 1 / k
                sums["recall"] += 1 / len(right)
                sums["nDCG"] += 1 / log2(r + 1) / ideal
                sums["PSP"] += weights[label]
                sums["PSnDCG"] += weights[label] / log2(r + 1) / ideal
    means = {name: sums[name] / len(lists) for name in ("P", "recall", "nDCG")}
    return means | {name: sums[name] / sums[f"best {name}"] for name in ("PSP", "PSnDCG")}


def as_lists(predicted: np.ndarray) -> list[list[int]]:
    return [[int(label) for label in row if label >= 0] for row in predicted]


@pytest.mark.parametrize("k", [1, 3, 5, 15])
def test_metrics_are_their_definitions(truth, training, predicted, k) -> None:
    weights = inverse_propensity(training, (0.6, 2.6))
    expected = defined(truth, as_lists(predicted), weights, k)
    ranking = rank(predicted, truth)
    assert set(expected) == set(METRICS)
    for name, metric in METRICS.items():
        assert metric(ranking, weights, k) == pytest.approx(expected[name], abs=TOLERANCE), name


@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_metrics_are_those_of_napkinxc(truth, training, predicted, k) -> None:
    oracle = pytest.importorskip("napkinxc.metrics")
    weights = inverse_propensity(training)
    np.testing.assert_allclose(weights, oracle.Jain_et_al_inverse_propensity(training), rtol=TOLERANCE)
    ranking = rank(predicted, truth)
    lists = as_lists(predicted)
    for name, theirs in (
        ("P", oracle.precision_at_k(truth, lists, k)),
        ("recall", oracle.recall_at_k(truth, lists, k)),
        ("nDCG", oracle.ndcg_at_k(truth, lists, k)),
        ("PSP", oracle.psprecision_at_k(truth, lists, weights, k)),
        ("PSnDCG", oracle.psndcg_at_k(truth, lists, weights, k)),
    ):
        assert METRICS[name](ranking, weights, k) == pytest.approx(theirs[k - 1], abs=TOLERANCE), name


def test_propensities_are_the_formula(training) -> None:
    counts = training.toarray().sum(axis=0)
    for a, b in ((0.55, 1.5), (0.6, 2.6), (0.5, 0.4)):
        scale = (log(TRAINING) - 1) * (b + 1) ** a
        expected = [1 + scale * (count + b) ** -a for count in counts]
        np.testing.assert_allclose(inverse_propensity(training, (a, b)), expected, rtol=TOLERANCE)
    with pytest.raises(ValueError, match="2 training documents"):
        inverse_propensity(training[:2])
    with pytest.raises(ValueError, match="A = 0, B = 1"):
        inverse_propensity(training, (0, 1))


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("LF-AmazonTitles-1.3M", (0.6, 2.6)),
        ("Amazon-670K", (0.6, 2.6)),
        ("LF-Wikipedia-500K", (0.5, 0.4)),
        ("LF-WikiTitles-500K", (0.5, 0.4)),
        ("WikiLSHTC-325K", (0.5, 0.4)),
        ("Wiki-500K", (0.5, 0.4)),
        ("LF-WikiSeeAlso-320K", (0.55, 1.5)),
        ("Wiki10-31K", (0.55, 1.5)),
        ("EURLex-4K", (0.55, 1.5)),
    ],
)
def test_constants_of_the_public_sets(name: str, constants: tuple[float, float]) -> None:
    assert propensity_constants(name) == constants


def test_scores_are_ranked_with_ties_by_label(truth) -> None:
    scores = csr_matrix((np.array([0.1, 0.7, 0.7, -2.0]), np.array([9, 30, 5, 2]), np.array([0, 4])), shape=(1, LABELS))
    assert rank(scores, truth[:1]).predicted.tolist() == [[5, 30, 9, 2]]
    assert rank(scores, truth[:1], k=2).predicted.tolist() == [[5, 30]]
    assert rank(scores, truth[:1], k=5).predicted.tolist() == [[5, 30, 9, 2, -1]]


def test_filtered_pairs_leave_the_predictions_and_not_the_truth() -> None:
    truth = csr_matrix(np.array([[1, 0, 1, 0], [0, 0, 0, 1]]))
    predicted = np.array([[0, 1, 2], [3, 1, -1]])
    pairs = np.array([[0, 0], [1, 1], [1, 2]])
    ranking = rank(predicted, truth, pairs)
    assert ranking.predicted.tolist() == [[1, 2, -1], [3, -1, -1]]
    assert ranking.label_counts.tolist() == [2, 1]
    assert METRICS["recall"](ranking, np.ones(4), 2) == pytest.approx((1 / 2 + 1) / 2)
    scores = csr_matrix(np.array([[9, 8, 7, 0], [0, 6, 0, 9]]))
    assert rank(scores, truth, pairs).predicted.tolist() == [[1, 2, -1], [3, -1, -1]]


def test_relevances_and_stored_zeros(training) -> None:
    truth = csr_matrix((np.array([0.5, 0.0, 2.0]), np.array([7, 8, 9]), np.array([0, 3])), shape=(1, LABELS))
    ranking = rank(np.array([[8, 9, 7]]), truth)
    assert ranking.hits.tolist() == [[False, True, True]]
    assert ranking.label_counts.tolist() == [2]
    assert truth.nnz == 3  # the caller's matrix stays as it is


def test_no_document_has_a_label(training) -> None:
    ranking = rank(np.zeros((4, 1), int), csr_matrix((4, LABELS)))
    found = evaluate(ranking, training, ks=[1], recall_ks=[1])
    assert set(found.values()) == {0.0}


def test_evaluate_names_every_metric(truth, training, predicted) -> None:
    ranking = rank(predicted, truth)
    found = evaluate(ranking, training, ks=(1, 5), constants=(0.5, 0.4), recall_ks=(10,))
    assert list(found) == [f"{name}@{k}" for name in ("P", "nDCG", "PSP", "PSnDCG") for k in (1, 5)] + ["recall@10"]
    weights = inverse_propensity(training, (0.5, 0.4))
    assert found["PSP@5"] == METRICS["PSP"](ranking, weights, 5)
    with pytest.raises(ValueError, match=r"ranks \[1, 3, 5, 10, 100\] are asked for; predictions have 1 to 15"):
        evaluate(ranking, training)
    with pytest.raises(ValueError, match="no document"):
        evaluate(Ranking(predicted[:0], truth[:0]), training, ks=[1], recall_ks=[])


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (np.zeros((3, 2)), "float64"),
        (np.zeros((2, 2), int), "for 3 documents"),
        (np.full((3, 1), LABELS), "go from 40 to 40; labels are 0 to 39"),
        (np.full((3, 1), -2), "go from -2"),
        (np.ones((3, 2), int), "predicted twice"),
    ],
)
def test_predictions_that_do_not_fit(truth, predicted, message) -> None:
    with pytest.raises(ValueError, match=message):
        rank(predicted, truth[:3])


def test_groups_by_frequency_add_up(truth, training, predicted) -> None:
    ranking = rank(predicted, truth)
    groups = by_frequency(ranking, training, k=5, groups=10)
    counts = training.toarray().sum(axis=0)
    assert len(groups) == 11
    assert (groups[0].labels, groups[0].fewest, groups[0].most) == ((counts == 0).sum(), 0, 0)
    assert sum(group.labels for group in groups) == LABELS
    assert sum(group.truths for group in groups) == truth.nnz
    assert sum(group.precision for group in groups) == pytest.approx(METRICS["P"](ranking, counts, 5), abs=TOLERANCE)
    sizes = [group.labels for group in groups[1:]]
    assert max(sizes) - min(sizes) <= 1
    for lower, upper in pairwise(groups[1:]):
        assert lower.fewest <= lower.most <= upper.fewest
    hits = sum(len(set(row[:5]) & set(truth[i].indices)) for i, row in enumerate(as_lists(predicted)))
    assert sum(group.recall * group.truths for group in groups if group.recall is not None) == pytest.approx(hits)
    with pytest.raises(ValueError, match="k must be from 1 to 15"):
        by_frequency(ranking, training, k=16)


def test_labels_that_training_never_has_are_a_group_of_their_own() -> None:
    training = csr_matrix(np.array([[0, 1, 1, 1]] * 2 + [[0, 0, 1, 1]] + [[0, 0, 0, 1]]))
    truth = csr_matrix(np.array([[1, 0, 0, 1], [1, 1, 0, 0]]))
    groups = by_frequency(rank(np.array([[0, 2], [3, 1]]), truth), training, k=2, groups=3)
    assert [group.labels for group in groups] == [1, 1, 1, 1]
    assert [(group.fewest, group.most) for group in groups] == [(0, 0), (2, 2), (3, 3), (4, 4)]
    assert [group.truths for group in groups] == [2, 1, 0, 1]
    assert [group.precision for group in groups] == [0.25, 0.25, 0.0, 0.0]
    assert [group.recall for group in groups] == [0.5, 1.0, None, 0.0]
