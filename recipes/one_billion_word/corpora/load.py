"""Decide which form of data a `--data` value names."""

from __future__ import annotations

import re
from pathlib import Path

from recipes.common.errors import RecipeError
from recipes.one_billion_word.corpora.corpus import Corpus
from recipes.one_billion_word.corpora.embedded import embedded_corpus
from recipes.one_billion_word.corpora.official import find_official_root, official_corpus
from recipes.one_billion_word.corpora.parquet import hub_corpus, parquet_corpus, parquet_files
from recipes.one_billion_word.corpora.text import text_corpus, text_files

FORMS = """--data takes one of
  a folder with the benchmark's training-monolingual.tokenized.shuffled and heldout-monolingual.tokenized.shuffled
  a folder (or one file) of text, plain or .gz, one sentence a line: *.txt, *.tokens, *.txt.gz, *.tokens.gz
  a folder (or one file) of .parquet with a column `text`
  the name of a dataset, as in dvruette/lm1b
  nothing: the English documentation inside this Python installation"""


def load_corpus(data: str | None = None) -> Corpus:
    """Open the corpus that `data` names.

    Args:
        data: a folder, a file, a dataset name, or None for the embedded corpus.

    Raises:
        RecipeError: nothing usable there. The message lists the forms that are understood.
    """
    if data is None:
        return embedded_corpus()
    path = Path(data).expanduser()
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.startswith("."):
            return hub_corpus(data, FORMS)
        raise RecipeError(f"--data {data!r} does not exist.\n{FORMS}")
    root = find_official_root(path)
    if root is not None:
        return official_corpus(root)
    if parquet_files(path):
        return parquet_corpus(path)
    if text_files(path):
        return text_corpus(path)
    raise RecipeError(f"--data {data!r} holds no file that is understood.\n{FORMS}")
