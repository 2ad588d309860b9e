"""Filter files: pairs of a test document and a label that is the document itself, not to be counted as predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipes.extreme_classification.readers.streams import malformed, numbered_lines

# The second is a slip in the instructions of public code, after which files are named.
NAMES = ("filter_labels_test.txt", "filter_labels_text.txt", "tst_filter_labels.txt")


def find_filter(folder: Path) -> Path | None:
    """The filter file of a folder under any of its three names, or None."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def read_filter(path: Path, documents: int, labels: int) -> np.ndarray:
    """Read `document label` pairs, one a line.

    Returns:
        int64 (pairs, 2).

    Raises:
        RecipeError: a line is not two whole numbers in range.
    """
    pairs = []
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            document, label = map(int, line.split())
        except ValueError:
            raise malformed(path, number, f"{line[:80]!r} is not of the form `document label`") from None
        if not (0 <= document < documents and 0 <= label < labels):
            raise malformed(
                path, number, f"pair {document} {label} is out of range: {documents} documents, {labels} labels"
            )
        pairs.append((document, label))
    return np.array(pairs, np.int64).reshape(-1, 2)
