"""Bag-of-words features of documents and labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from recipes.extreme_classification.dataset import Splits
from recipes.one_billion_word.errors import RecipeError


class Features(NamedTuple):
    """Rows of length 1, float32: (documents, F), (documents, F), and (labels, F), zero where labels have no text."""

    train: csr_matrix
    test: csr_matrix
    labels: csr_matrix


def make_features(splits: Splits, characters: int = 5, limit: int = 300_000) -> Features:
    """tf-idf of words and of character n-grams, which find the parts of compounds; or the features of the data set.

    Args:
        splits: with texts or features.
        characters: n of the n-grams within words; 0 for words alone.
        limit: keep so many of the most frequent words, and of the n-grams.

    Raises:
        RecipeError: no text holds a word.
    """
    train, test = splits.train, splits.test
    if train.texts is None or test.texts is None:
        assert train.features is not None and test.features is not None
        none = csr_matrix((train.shape[1], train.features.shape[1]), dtype=np.float32)  # pyright: ignore
        return Features(_unit(train.features), _unit(test.features), none)
    common = {"sublinear_tf": True, "dtype": np.float32, "max_features": limit}
    makers = [TfidfVectorizer(token_pattern=r"\w+", **common)]
    if characters:
        makers.append(TfidfVectorizer(analyzer="char_wb", ngram_range=(characters, characters), min_df=2, **common))
    label_texts = list(train.label_texts or [""] * train.shape[1])
    try:
        for maker in makers:
            maker.fit([*train.texts, *label_texts])
    except ValueError as error:  # an empty vocabulary
        raise RecipeError(f"{splits.name}: no features could be made of the texts: {error}") from error
    return Features(
        *(
            _unit(hstack([maker.transform(texts) for maker in makers]))
            for texts in (train.texts, test.texts, label_texts)
        )
    )


def _unit(matrix: object) -> csr_matrix:
    return csr_matrix(normalize(csr_matrix(matrix, dtype=np.float32)))
