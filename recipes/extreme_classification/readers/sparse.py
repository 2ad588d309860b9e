"""Sparse text files of the Extreme Classification Repository, and scipy's .npz.

Two text forms: `trn_X_Y.txt` and alike, `rows columns` and then `column:value column:value` a row; and the older
`train.txt`, `rows features labels` and then `label,label feature:value feature:value` a row. Indices count from 0. A
row may be empty.
"""

from __future__ import annotations

import math
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from scipy.sparse import csr_matrix, issparse, load_npz

from recipes.common.errors import RecipeError
from recipes.extreme_classification.readers.rows import Rows
from recipes.extreme_classification.readers.streams import malformed, numbered_lines


def read_pairs(path: Path) -> csr_matrix:
    """Read `trn_X_Y.txt`, `trn_X_Xf.txt` or any file of that form: float32 (rows, columns).

    Raises:
        RecipeError: a line is not of the form, an index is out of range, or there are more or fewer rows than the
            header says.
    """
    lines = numbered_lines(path)
    rows, columns = _read_header(path, next(lines, (1, "")), "rows columns")
    found = Rows()
    for number, line in lines:
        _expect_a_row(path, number, line, len(found), rows)
        if len(found) < rows:
            found.append(*_parse_pairs(path, number, line.split(), columns, "column"))
    _check_count(path, len(found), rows)
    return found.matrix(columns)


def read_labelled(path: Path) -> tuple[csr_matrix, csr_matrix]:
    """Read `train.txt` or `test.txt`, the older form: features (documents, F) and labels (documents, L).

    A document without labels starts with a space, or with its first `feature:value`.

    Raises:
        RecipeError: as `read_pairs`.
    """
    lines = numbered_lines(path)
    rows, features, labels = _read_header(path, next(lines, (1, "")), "documents features labels")
    of_features, of_labels = Rows(), Rows()
    for number, line in lines:
        _expect_a_row(path, number, line, len(of_labels), rows)
        if len(of_labels) == rows:
            continue
        first, _, rest = line.partition(" ")
        names, pairs = ("", line) if ":" in first else (first, rest)
        try:
            columns = [int(name) for name in names.split(",") if names]
        except ValueError:
            raise malformed(path, number, f"{names!r} is not a list of labels such as 3,17,256") from None
        _check_range(path, number, columns, labels, "label")
        of_labels.append(columns, [1.0] * len(columns))
        of_features.append(*_parse_pairs(path, number, pairs.split(), features, "feature"))
    _check_count(path, len(of_labels), rows)
    return of_features.matrix(features), of_labels.matrix(labels)


def read_npz(path: Path) -> csr_matrix:
    """Read a matrix that `scipy.sparse.save_npz` wrote, as float32 CSR.

    Raises:
        RecipeError: the file is none.
    """
    try:
        matrix = load_npz(path)
        assert issparse(matrix)
        if matrix.format in ("csr", "csc"):  # of the other forms, making rows of them checks the indices
            matrix.check_format(full_check=True)  # pyright: ignore
        found = csr_matrix(matrix, dtype=np.float32)
    except (OSError, ValueError, KeyError, IndexError, BadZipFile, EOFError) as error:
        raise RecipeError(f"{path} is no sparse matrix of scipy.sparse.save_npz: {error}") from error
    found.sum_duplicates()
    if not np.isfinite(found.data).all():
        raise RecipeError(f"{path} holds numbers that are not finite")
    return found


def _read_header(path: Path, first: tuple[int, str], names: str) -> tuple[int, ...]:
    number, line = first
    try:
        counts = tuple(int(count) for count in line.split())
    except ValueError:
        counts = ()
    if len(counts) != len(names.split()) or min(counts) < 0:
        raise malformed(path, number, f"{line[:80]!r} is no header of the form `{names}`")
    return counts


def _expect_a_row(path: Path, number: int, line: str, read: int, rows: int) -> None:
    if read == rows and line.strip():  # empty lines at the end do no harm
        raise malformed(path, number, f"the header in line 1 says {rows} rows, and here is one more")


def _check_count(path: Path, read: int, rows: int) -> None:
    if read != rows:
        raise malformed(path, 1, f"the header says {rows} rows, and the file has {read}: it may be cut short")


def _parse_pairs(path: Path, number: int, pairs: list[str], columns: int, what: str) -> tuple[list[int], list[float]]:
    indices, values = [], []
    for pair in pairs:
        index, _, value = pair.partition(":")
        try:
            indices.append(int(index))
            values.append(float(value))
        except ValueError:
            raise malformed(path, number, f"{pair!r} is not of the form {what}:value, as in 17:0.25") from None
    if not all(map(math.isfinite, values)):
        raise malformed(path, number, "a value is not finite")
    _check_range(path, number, indices, columns, what)
    return indices, values


def _check_range(path: Path, number: int, indices: list[int], columns: int, what: str) -> None:
    if indices and not 0 <= min(indices) <= max(indices) < columns:
        wrong = next(index for index in indices if not 0 <= index < columns)
        raise malformed(path, number, f"{what} {wrong} is out of range: the header says 0 to {columns - 1}")
