"""The data set that is always there, made from the Python installation: which names does the code use?

A document is the docstring of a class or a function of the standard library, a label is a name that the code under
it uses, and a label's text is that name in words. About 7,700 documents, 17,000 labels, 13 a document: many rare
labels in long and noisy lists, as in the large public sets. It differs a little between versions of Python, so numbers
on it compare only between runs of one installation.
"""

from __future__ import annotations

import ast
import functools
import gc
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recipes.common.errors import RecipeError
from recipes.common.sources import standard_library, syntax_trees
from recipes.extreme_classification.dataset import Dataset, Splits
from recipes.extreme_classification.readers.rows import Rows
from xhead.retrieval.propensity import propensity_constants

MINIMUM_DOCUMENTS = 2_000
TEST_SHARE = 10  # one document in ten
DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def embedded_splits(text: str = "title", root: Path | None = None) -> Splits:
    """The documented code of a folder, split 90/10 by the docstrings' checksums: equal ones are on one side.

    Args:
        text: `title` for the first line of each docstring, `content` for all of it.
        root: Python sources; the standard library by default.

    Raises:
        RecipeError: the installation was stripped of its sources.
    """
    documents = _documents(root or standard_library())
    if root is None and len(documents) < MINIMUM_DOCUMENTS:
        raise RecipeError(
            f"this Python installation ({sys.executable}) holds only {len(documents)} documented functions and "
            f"classes, {MINIMUM_DOCUMENTS} are needed: its sources were stripped. Give a data set with --data"
        )
    names = sorted(set().union(*(used for _, used in documents)))
    index = {name: position for position, name in enumerate(names)}
    in_test = [zlib.crc32(docstring.encode()) % TEST_SHARE == 0 for docstring, _ in documents]
    train, test = (
        _split([document for document, tested in zip(documents, in_test, strict=True) if tested is side], index, text)
        for side in (False, True)
    )
    version = ".".join(map(str, sys.version_info[:3]))
    name = f"names in the code of Python {version}, by docstring"
    return Splits(train, test, filter=None, propensity=propensity_constants(name), name=name)


def _split(documents: list[tuple[str, tuple[str, ...]]], index: dict[str, int], text: str) -> Dataset:
    rows = Rows()
    for _, used in documents:
        rows.append([index[name] for name in used], np.ones(len(used)).tolist())
    texts = [docstring.partition("\n")[0] if text == "title" else docstring for docstring, _ in documents]
    return Dataset(texts, rows.matrix(len(index)), [in_words(name) for name in index], None)


def in_words(name: str) -> str:
    """`readFile_now` as `read file now`; a name without a letter or digit stays as it is."""
    return " ".join(re.findall(r"[^\W_]+", HUMP.sub(" ", name))).lower() or name


@functools.cache
def _documents(root: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Docstrings and the names used under them, in the order of file names and positions; nothing is imported."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and walking them all again and again takes half of the time
    try:
        return list(_read_documents(root))
    finally:
        if collecting:
            gc.enable()


def _read_documents(root: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for tree in syntax_trees(root):
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
                names = tuple(sorted(set(_names(node.body[1:]))))
                if names:
                    yield docstring, names


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
