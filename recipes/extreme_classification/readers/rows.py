"""A sparse matrix that grows row by row, as files are read."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix


class Rows:
    """Rows of a sparse matrix, 12 bytes an entry while they come in."""

    def __init__(self) -> None:
        self._starts = array("q", [0])
        self._columns = array("q")
        self._values = array("f")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, columns: Sequence[int], values: Sequence[float]) -> None:
        """Add a row: as many values as columns."""
        self._columns.extend(columns)
        self._values.extend(values)
        self._starts.append(len(self._columns))

    @property
    def largest_column(self) -> int:
        """-1 where nothing is stored."""
        return int(np.max(np.asarray(self._columns), initial=-1))

    def matrix(self, columns: int) -> csr_matrix:
        """The rows as float32 CSR with sorted columns; entries of one place are added up."""
        parts = (np.array(self._values, np.float32), np.array(self._columns), np.array(self._starts))
        matrix = csr_matrix(parts, shape=(len(self), columns))
        matrix.sum_duplicates()
        return matrix


def as_labels(matrix: csr_matrix) -> csr_matrix:
    """Relevances as float32 CSR in canonical form, without stored zeros."""
    matrix = csr_matrix(matrix, dtype=np.float32)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix
