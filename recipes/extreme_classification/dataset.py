"""A data set of extreme classification: documents, labels, and what measuring on them needs.

A folder may hold any of these files, and each part is taken from the first that is there:

    part          of the training split                                              and of the test split
    labels        Y.trn.npz, trn_X_Y.txt, trn.json.gz, trn.json, train.txt           the same with tst, test
    texts         trn.json.gz, trn.json, raw/trn_X.txt, trn_X.txt
    features      X.trn.npz, trn_X_Xf.txt, train.txt
    label texts   lbl.json.gz, lbl.json, raw/Y.txt, Y.txt
    filter                                                     filter_labels_test.txt, filter_labels_text.txt,
                                                               tst_filter_labels.txt
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from recipes.common.errors import RecipeError
from recipes.extreme_classification.readers.filters import find_filter, read_filter
from recipes.extreme_classification.readers.json_lines import read_documents, read_label_texts
from recipes.extreme_classification.readers.rows import as_labels
from recipes.extreme_classification.readers.sparse import read_labelled, read_npz, read_pairs
from recipes.extreme_classification.readers.text import MappedLines
from xhead.retrieval.propensity import propensity_constants

TEXTS = ("title", "content")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """One split.

    Attributes:
        texts: of the documents, in memory or memory-mapped; None where the data set has features only.
        labels: relevances, float32 (documents, labels), canonical CSR without stored zeros. A row may be empty.
        label_texts: of the labels, none of them empty; None where the data set has none.
        features: sparse bag-of-words features, float32 (documents, F), where they were read.
    """

    texts: Sequence[str] | None
    labels: csr_matrix
    label_texts: Sequence[str] | None
    features: csr_matrix | None

    def __post_init__(self) -> None:
        documents, labels = self.shape
        for name, part, wanted in (
            ("texts", None if self.texts is None else len(self.texts), documents),
            ("rows of features", None if self.features is None else _shape(self.features)[0], documents),
            ("label texts", None if self.label_texts is None else len(self.label_texts), labels),
        ):
            if part is not None and part != wanted:
                raise RecipeError(f"{part} {name} for a label matrix of {documents} documents and {labels} labels")

    @property
    def shape(self) -> tuple[int, int]:
        """Documents, labels."""
        return _shape(self.labels)


@dataclass(frozen=True)
class Splits:
    """A data set.

    Attributes:
        train, test: the splits, over the same labels.
        filter: int64 (pairs, 2), test document and label, which are removed from predictions before they are measured;
            None where the data set has no such file.
        propensity: the constants A and B of Jain et al.'s model.
        name: what was read, for reports.
    """

    train: Dataset
    test: Dataset
    filter: np.ndarray | None
    propensity: tuple[float, float]
    name: str

    def __post_init__(self) -> None:
        if self.train.shape[1] != self.test.shape[1]:
            raise RecipeError(f"{self.train.shape[1]} labels in training and {self.test.shape[1]} in the test split")
        widths = [_shape(part.features)[1] for part in (self.train, self.test) if part.features is not None]
        if len(set(widths)) > 1:
            raise RecipeError(f"{widths[0]} features in training and {widths[1]} in the test split")


def load(
    data: str | Path | None = None,
    text: str = "title",
    *,
    cache: str | Path | None = None,
    features: bool | None = None,
) -> Splits:
    """Read a data set.

    Args:
        data: its folder; None for the embedded set, made from this Python installation.
        text: what a document is, `title` or `content` (title and content). For the embedded set, the first line of a
            docstring or all of it.
        cache: a folder to keep the texts of .json.gz files in, memory-mapped instead of in memory.
        features: read the sparse features; None reads them only where there are no texts.

    Raises:
        RecipeError: the folder holds no data set, or a file of it is not what it should be.
    """
    if text not in TEXTS:
        raise RecipeError(f"--text is {text!r}; it must be one of {', '.join(TEXTS)}")
    if data is None:
        from recipes.extreme_classification.embedded import embedded_splits

        return embedded_splits(text)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise RecipeError(f"--data {str(data)!r} is no folder.\n{__doc__}")
    label_texts = _label_texts(folder)
    labels = None if label_texts is None else len(label_texts)
    parts = [
        _read_split(folder, short, long, text, None if cache is None else Path(cache), labels, features)
        for short, long in (("trn", "train"), ("tst", "test"))
    ]
    stated = {str(part.stated): _shape(part.labels)[1] for part in parts if part.stated is not None}
    if labels is not None:
        stated["the label texts"] = labels
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{count} in {name}" for name, count in stated.items())
        raise RecipeError(f"files must agree on the number of labels: {said}")
    # Where nothing says it, the JSON files only know the largest label that they have.
    labels = next(iter(stated.values()), None) or max(_shape(part.labels)[1] for part in parts)
    train, test = (part.dataset(folder, labels, label_texts) for part in parts)
    empty = [int((np.diff(split.labels.indptr) == 0).sum()) for split in (train, test)]
    if any(empty):
        logger.warning("%s: %d training and %d test documents have no label", folder, *empty)
    pairs = find_filter(folder)
    if pairs is not None:
        logger.info("%s: predictions are filtered by %s", folder, pairs.name)
    return Splits(
        train=train,
        test=test,
        filter=None if pairs is None else read_filter(pairs, *test.shape),
        propensity=propensity_constants(folder.resolve().name),
        name=folder.resolve().name + (f", filtered by {pairs.name}" if pairs else ""),
    )


@dataclass(frozen=True)
class _Part:
    """What the files of a split hold. stated: the file that says itself how many labels there are, if one does."""

    name: str
    texts: Sequence[str] | None
    labels: csr_matrix
    features: csr_matrix | None
    stated: Path | None

    def dataset(self, folder: Path, labels: int, label_texts: Sequence[str] | None) -> Dataset:
        rows, columns = _shape(self.labels)
        if columns > labels:
            raise RecipeError(f"{folder}, {self.name} split: label {columns - 1} of {labels}")
        whole = csr_matrix((self.labels.data, self.labels.indices, self.labels.indptr), shape=(rows, labels))
        try:
            return Dataset(self.texts, whole, label_texts, self.features)
        except RecipeError as error:
            raise RecipeError(f"{folder}, {self.name} split: {error}") from error


def _read_split(
    folder: Path,
    short: str,
    long: str,
    text: str,
    cache: Path | None,
    label_count: int | None,
    wants_features: bool | None,
) -> _Part:
    """Texts, labels and features of the split whose files are named by `short` and `long`."""
    stated: Path | None = None
    texts: Sequence[str] | None = None
    labels = features = None
    if found := _first(folder, f"Y.{short}.npz", f"{short}_X_Y.txt"):
        labels, stated = _read_matrix(found), found
    if documents := _first(folder, f"{short}.json.gz", f"{short}.json"):
        kept = None if cache is None else cache / f"{folder.resolve().name}.{short}.{text}.txt"
        texts, of_documents = read_documents(documents, text, label_count, kept)
        labels = of_documents if labels is None else labels
    elif found := _first(folder, f"raw/{short}_X.txt", f"{short}_X.txt"):
        texts = MappedLines(found)
    wanted = texts is None if wants_features is None else wants_features
    if found := _first(folder, f"X.{short}.npz", f"{short}_X_Xf.txt"):
        features = _read_matrix(found) if wanted else None
    elif (found := _first(folder, f"{long}.txt")) and (wanted or labels is None):
        features, of_file = read_labelled(found)
        labels, stated = (of_file, found) if labels is None else (labels, stated)
    if labels is None:
        raise RecipeError(f"{folder} holds no labels of the {long} split.\n{__doc__}")
    if texts is None and features is None:
        raise RecipeError(f"{folder} holds neither texts nor features of the {long} split.\n{__doc__}")
    return _Part(long, texts, as_labels(labels), features, stated)


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_matrix(path: Path) -> csr_matrix:
    return read_npz(path) if path.suffix == ".npz" else read_pairs(path)


def _label_texts(folder: Path) -> list[str] | None:
    if found := _first(folder, "lbl.json.gz", "lbl.json"):
        texts, empty = read_label_texts(found)
        if empty:
            logger.warning("%s: %d labels have no title, and are called by their uid", found, empty)
        return texts
    if found := _first(folder, "raw/Y.txt", "Y.txt"):
        texts = [line.strip() or f"label {index}" for index, line in enumerate(MappedLines(found))]
        empty = sum(not line.strip() for line in MappedLines(found))
        if empty:
            logger.warning("%s: %d labels have no text, and are called `label N`", found, empty)
        return texts
    return None


def _shape(matrix: csr_matrix) -> tuple[int, int]:
    rows, columns = matrix.shape  # pyright: ignore
    return rows, columns
