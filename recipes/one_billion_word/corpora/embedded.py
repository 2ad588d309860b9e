"""The corpus that is always there: the English documentation inside the Python installation.

The reference manual's topics that `help()` prints, and the docstrings in the sources of the standard library: about
two and a half megabytes of edited technical English, half a million tokens, 15,000 types. It differs a little between
versions of Python, so losses on it compare only between runs of one installation.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
from collections.abc import Iterator

from recipes.common.errors import RecipeError
from recipes.common.sources import standard_library, syntax_trees
from recipes.one_billion_word.corpora.corpus import Corpus, split_by_hash

TOKEN = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|\d+|_+|[^\w\s]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(*])")
MINIMUM_SENTENCES = 5_000


def embedded_corpus() -> Corpus:
    """The documentation as a corpus, split 90/5/5 by the sentences' checksums.

    Raises:
        RecipeError: the installation was stripped of sources or topics.
    """
    sentences = _sentences()
    if len(sentences) < MINIMUM_SENTENCES:
        raise RecipeError(
            f"this Python installation ({sys.executable}) holds only {len(sentences)} sentences of documentation, "
            f"{MINIMUM_SENTENCES} are needed: its sources were stripped. Give text of your own with --data"
        )
    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus(
        name=f"the documentation inside Python {version}: manual topics and standard-library docstrings",
        test_name="5 % of its sentences, chosen by checksum",
        identity=f"python-{version}-{len(sentences)}",
        train=split_by_hash(lambda: iter(sentences), "train"),
        valid=split_by_hash(lambda: iter(sentences), "valid"),
        test=split_by_hash(lambda: iter(sentences), "test"),
    )


@functools.cache
def _sentences() -> list[str]:
    return [sentence for text in (*_topics(), *_docstrings()) for sentence in split_sentences(text)]


def split_sentences(text: str) -> Iterator[str]:
    """Cut a documentation text into tokenized sentences, tokens joined by spaces.

    Paragraphs end sentences; lines of interactive examples and rulers are left out.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        prose = " ".join(line.strip() for line in paragraph.splitlines() if not _is_noise(line))
        for sentence in SENTENCE_END.split(prose):
            tokens = TOKEN.findall(sentence)
            if len(tokens) > 1:
                yield " ".join(tokens)


def _is_noise(line: str) -> bool:
    stripped = line.strip()
    return stripped.startswith((">>>", "...")) or not any(character.isalnum() for character in stripped)


def _topics() -> list[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package the manual apart; the docstrings may still suffice
        return []
    return [topics[name] for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    """Docstrings in the order of file names and positions."""
    for tree in syntax_trees(standard_library()):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
