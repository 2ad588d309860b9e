"""From the options to packed blocks; what was built is kept in the output folder and found there by the next run."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm

from recipes.one_billion_word.corpora import Corpus, load_corpus
from recipes.one_billion_word.corpora.corpus import SPLITS
from recipes.one_billion_word.encoding import Encoded, encode, is_encoded, load_encoded
from recipes.one_billion_word.options import DataOptions
from recipes.one_billion_word.packing import PackedSentences
from recipes.one_billion_word.vocabulary import Vocabulary


@dataclass(frozen=True)
class Data:
    """A corpus in blocks.

    Attributes:
        fingerprint: changes when sentences, vocabulary or block length change: a checkpoint belongs to one.
    """

    corpus: Corpus
    vocabulary: Vocabulary
    train: PackedSentences
    valid: PackedSentences
    test: PackedSentences
    fingerprint: str


def prepare_data(options: DataOptions, folder: Path) -> Data:
    """Open, count, encode and pack. In a distributed run the first process builds, the others read what it wrote.

    Args:
        options: which text.
        folder: where the vocabulary and the encoded splits are kept.

    Raises:
        RecipeError: the data or the vocabulary file cannot be used.
    """
    with PartialState().main_process_first():
        corpus = load_corpus(options.data).with_valid_limit(options.valid_sentences)
        vocabulary = _vocabulary(options, corpus, folder)
        key = _digest(corpus.identity, vocabulary.fingerprint, options.join_lines)
        encoded = {split: _encoded(split, corpus, vocabulary, folder / f"{split}-{key}", options) for split in SPLITS}
    length = options.block_length
    return Data(
        corpus=corpus,
        vocabulary=vocabulary,
        train=PackedSentences(encoded["train"], length, padding=vocabulary.end),
        valid=PackedSentences(encoded["valid"], length, overlap=length // 2, padding=vocabulary.end),
        test=PackedSentences(encoded["test"], length, overlap=length // 2, padding=vocabulary.end),
        fingerprint=_digest(key, length),
    )


def _vocabulary(options: DataOptions, corpus: Corpus, folder: Path) -> Vocabulary:
    if options.vocab is not None:
        return Vocabulary.read(Path(options.vocab))
    path = folder / f"vocabulary-{_digest(corpus.identity, options.min_count, options.vocab_size)}.txt"
    if not path.is_file():
        lines = _with_progress(corpus.lines("train"), "counting words")
        vocabulary = Vocabulary.build(lines, min_count=options.min_count, size=options.vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        vocabulary.write(unfinished)
        shutil.move(unfinished, path)
    return Vocabulary.read(path)


def _encoded(split: str, corpus: Corpus, vocabulary: Vocabulary, folder: Path, options: DataOptions) -> Encoded:
    if is_encoded(folder):
        return load_encoded(folder)
    lines = _with_progress(corpus.lines(split), f"encoding {split}")
    return encode(lines, vocabulary, folder, join_lines=options.join_lines)


def _with_progress(lines: Iterable[str], title: str) -> Iterable[str]:
    return tqdm(lines, desc=title, unit=" sentences", unit_scale=True, leave=False, disable=None)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
