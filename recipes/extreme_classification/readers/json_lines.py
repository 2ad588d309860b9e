"""The label-feature form: `trn.json.gz`, `tst.json.gz`, `lbl.json.gz`, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.sparse import csr_matrix

from recipes.extreme_classification.readers.rows import Rows, as_labels
from recipes.extreme_classification.readers.streams import malformed, numbered_lines
from recipes.extreme_classification.readers.text import write_lines


def read_documents(
    path: Path, text: str, labels: int | None, cache: Path | None = None
) -> tuple[Sequence[str], csr_matrix]:
    """Read documents with their labels.

    Args:
        path: a file whose objects have `title`, `target_ind` (label indices) and, where there are any, `content` and
            `target_rel` (relevances, 1 by default). A document may have no label.
        text: `title`, or `content` for title and content, a space between them.
        labels: how many labels there are; None takes them from the largest index.
        cache: a file to keep the texts in, memory-mapped, instead of in memory.

    Returns:
        The texts, and the relevances (documents, labels).

    Raises:
        RecipeError: a line is not of the form, or names a label twice or out of range.
    """
    rows = Rows()

    def texts() -> Iterator[str]:
        for number, record in _records(path):
            rows.append(*_targets(path, number, record, labels))
            title, content = (_string(path, number, record, key) for key in ("title", "content"))
            yield title if text == "title" else f"{title} {content}".strip()

    found = list(texts()) if cache is None else write_lines(texts(), cache)
    return found, as_labels(rows.matrix(rows.largest_column + 1 if labels is None else labels))


def read_label_texts(path: Path) -> tuple[list[str], int]:
    """Read the titles of labels; the line says which label it is.

    A label whose title is empty gets its `uid` as text, or where that is empty too, `label N`.

    Returns:
        The texts, and how many of them had no title.
    """
    texts: list[str] = []
    empty = 0
    for number, record in _records(path):
        title = _string(path, number, record, "title").strip()
        empty += not title
        texts.append(title or str(record.get("uid", "")).strip() or f"label {number - 1}")
    return texts, empty


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise malformed(path, number, f"not JSON ({error}): {line[:80]!r}") from error
        if not isinstance(record, dict) or "title" not in record:
            raise malformed(path, number, f"not a JSON object with the key `title`: {line[:80]!r}")
        yield number, record


def _string(path: Path, number: int, record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise malformed(path, number, f"`{key}` is {value!r}; it must be a string")
    return value or ""


def _targets(path: Path, number: int, record: dict[str, Any], labels: int | None) -> tuple[list[int], list[float]]:
    indices = record.get("target_ind")
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise malformed(path, number, f"`target_ind` is {indices!r}; it must be a list of label indices")
    relevances = record.get("target_rel") or [1.0] * len(indices)
    if len(relevances) != len(indices):
        raise malformed(path, number, f"{len(indices)} labels in `target_ind`, {len(relevances)} in `target_rel`")
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in relevances):
        raise malformed(path, number, f"`target_rel` is {relevances}; it must hold finite numbers, none below 0")
    if len(set(indices)) != len(indices):
        raise malformed(path, number, f"a label is named twice in `target_ind`: {indices}")
    wrong = [index for index in indices if index < 0 or (labels is not None and index >= labels)]
    if wrong:
        allowed = "not be negative" if labels is None else f"be from 0 to {labels - 1}"
        raise malformed(path, number, f"label {wrong[0]} is out of range; it must {allowed}")
    return indices, relevances
