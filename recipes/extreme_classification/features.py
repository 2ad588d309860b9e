"""Bag-of-words features of documents and labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.preprocessing import normalize

from recipes.common.errors import RecipeError
from recipes.extreme_classification.dataset import Splits
from recipes.extreme_classification.readers.rows import Rows

WORD = re.compile(r"\w+")
FILE = "features.json"


class TfIdf:
    """Words, and the character n-grams inside them, which find the parts of compounds.

        weight = (1 + ln times in the text) (1 + ln((1 + texts) / (1 + texts with it)))

    A row is of length 1, half of its square from the words and half from the n-grams, where it has both.

    Attributes:
        features: the words, and behind them the n-grams with a `#` in front.
        idf: the second factor, float32 (F,).
        characters: n; 0 for words alone.
    """

    def __init__(self, features: Sequence[str], idf: np.ndarray, characters: int) -> None:
        self.features, self.idf, self.characters = list(features), idf, characters
        self._places = {feature: place for place, feature in enumerate(self.features)}
        self._words = sum(not feature.startswith("#") for feature in self.features)

    @classmethod
    def fit(cls, texts: Sequence[str], characters: int = 5, limit: int = 300_000) -> TfIdf:
        """Take the features from texts: of words and of n-grams each the `limit` that are in the most texts, and of
        n-grams those in two or more.

        Raises:
            RecipeError: no text holds a word.
        """
        words: dict[str, int] = {}
        places: dict[str, int] = {}
        counts = _count(map(_words, texts), words)
        held = _count((_features(word, characters) for word in words), places)
        texts_with = np.bincount(csr_matrix(counts @ held).indices, minlength=len(places))
        names = np.array(list(places), object)
        inside = np.array([name.startswith("#") for name in names], bool)
        chosen = []
        for kind in (~inside, inside & (texts_with > 1)):
            of_kind = np.flatnonzero(kind)
            chosen.append(of_kind[np.argsort(-texts_with[of_kind], kind="stable")[:limit]])
        if not len(chosen[0]):
            raise RecipeError(f"no features could be made of {len(texts)} texts: none holds a word")
        index = np.concatenate(chosen)
        idf = 1 + np.log((1 + len(texts)) / (1 + texts_with[index]))
        return cls(names[index].tolist(), idf.astype(np.float32), characters)

    def __call__(self, texts: Iterable[str]) -> csr_matrix:
        """float32 (texts, F). The row of a text without a known word is empty."""
        words: dict[str, int] = {}
        counts = _count(map(_words, texts), words)
        rows = Rows()
        for word in words:
            found = [self._places[name] for name in _features(word, self.characters) if name in self._places]
            rows.append(found, [1.0] * len(found))
        times = csr_matrix(counts @ rows.matrix(len(self.features)))
        times.data = (1 + np.log(times.data)) * self.idf[times.indices]
        parts = [normalize(part) for part in (times[:, : self._words], times[:, self._words :]) if part.shape[1]]
        return _unit(hstack(parts))

    def save(self, folder: Path) -> None:
        """Write features.json."""
        state = {"characters": self.characters, "features": self.features, "idf": self.idf.tolist()}
        (folder / FILE).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TfIdf:
        """What `save` wrote."""
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(state["features"], np.array(state["idf"], np.float32), state["characters"])


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _features(word: str, characters: int) -> Iterator[str]:
    yield word
    if characters:
        padded = f" {word} "
        for start in range(max(len(padded) - characters, 0) + 1):
            yield "#" + padded[start : start + characters]


def _count(parts: Iterable[Iterable[str]], places: dict[str, int]) -> csr_matrix:
    """How often each name is in each of the parts; new names are given places."""
    rows = Rows()
    for names in parts:
        found = [places.setdefault(name, len(places)) for name in names]
        rows.append(found, [1.0] * len(found))
    return rows.matrix(len(places))


class Features(NamedTuple):
    """Rows of length 1, float32: (documents, F), (documents, F), and (labels, F), zero where labels have no text."""

    train: csr_matrix
    test: csr_matrix
    labels: csr_matrix


def make_features(splits: Splits, characters: int = 5) -> Features:
    """tf-idf of the texts, or the features of the data set where it has no texts.

    Args:
        splits: with texts or features.
        characters: n of the n-grams; 0 for words alone.

    Raises:
        RecipeError: no text holds a word.
    """
    train, test = splits.train, splits.test
    if train.texts is None or test.texts is None:
        assert train.features is not None and test.features is not None
        none = csr_matrix((train.shape[1], train.features.shape[1]), dtype=np.float32)  # pyright: ignore
        return Features(_unit(train.features), _unit(test.features), none)
    label_texts = list(train.label_texts or [""] * train.shape[1])
    make = TfIdf.fit([*train.texts, *label_texts], characters)
    return Features(make(train.texts), make(test.texts), make(label_texts))


def largest(matrix: csr_matrix, most: int) -> csr_matrix:
    """The largest entries of each row, at most so many, in descending order."""
    counts = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((np.negative(matrix.data), rows))
    kept = order[np.arange(len(rows)) - matrix.indptr[rows] < most]
    starts = np.concatenate([[0], np.cumsum(np.minimum(counts, most))])
    return csr_matrix((matrix.data[kept], matrix.indices[kept], starts), shape=matrix.shape)


def _unit(matrix: object) -> csr_matrix:
    return csr_matrix(normalize(csr_matrix(matrix, dtype=np.float32)))
