"""A data set of extreme classification that is learnt within seconds: documents name their labels."""

import numpy as np
from scipy.sparse import csr_matrix

from recipes.extreme_classification.dataset import Dataset, Splits
from recipes.extreme_classification.neural.options import NeuralOptions

WORDS = "apple bridge cloud drum engine forest glass harbour island jacket kettle lamp".split()  # noqa: SIM905


def split_of(count, seed):
    """A document names its labels, among noise; some documents have none."""
    random = np.random.default_rng(seed)
    texts, rows = [], []
    for _ in range(count):
        chosen = sorted(random.choice(len(WORDS), size=random.integers(0, 4), replace=False).tolist())
        texts.append(" ".join(["the", *(WORDS[label] for label in chosen), "here"]))
        rows.append(chosen)
    offsets = np.cumsum([0, *map(len, rows)])
    labels = csr_matrix((np.ones(offsets[-1], np.float32), np.concatenate(rows).astype(int), offsets))
    labels.resize(count, len(WORDS))
    return Dataset(texts, labels, [f"a {word}" for word in WORDS], None)


def word_splits():
    return Splits(split_of(240, 0), split_of(40, 1), filter=None, propensity=(0.55, 1.5), name="words")


def small_options(**changed):
    small = {"hidden_size": 32, "vocab_size": 120, "max_length": 12, "batch_size": 32, "epochs": 8, "patience": 8}
    return NeuralOptions(
        **{**small, "learning_rate": 1e-2, "label_chunk": 5, "dropout": 0.0, "held_out": 0.1, **changed}
    )
