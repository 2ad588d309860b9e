"""Plain or gzipped text files, one sentence a line."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

from recipes.common.errors import RecipeError
from recipes.one_billion_word.corpora.corpus import Corpus, Lines, file_identity, split_by_hash

ENDINGS = (".txt", ".tokens", ".txt.gz", ".tokens.gz")
NAMES = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}


def read_lines(paths: Sequence[Path]) -> Lines:
    """The lines of the files, one file after the other, without their line ends."""

    def stream() -> Iterator[str]:
        for path in paths:
            open_file = gzip.open if path.suffix == ".gz" else open
            with open_file(path, "rt", encoding="utf-8", newline="\n") as file:
                try:
                    for line in file:
                        yield line.rstrip("\n")
                except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
                    raise RecipeError(f"{path} cannot be read as UTF-8 text: {error}") from error

    return stream


def text_files(path: Path) -> list[Path]:
    """The text files that `path` is or holds, in the order of their names."""
    if path.is_file():
        return [] if path.suffix == ".parquet" else [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(ENDINGS))


def group_by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Sort files into splits by the words train, valid or dev, and test in their names."""
    groups: dict[str, list[Path]] = {split: [] for split in NAMES}
    for file in files:
        for split, words in NAMES.items():
            if any(word in file.name.lower() for word in words):
                groups[split].append(file)
                break
    return groups


def text_corpus(path: Path) -> Corpus:
    """Text files as a corpus.

    Where no file is named for training, all of them are one pool, of which one line in 20 is validation and one test,
    by the line's checksum. A missing validation or test file is taken out of the training lines by the same rule.
    """
    files = text_files(path)
    groups = group_by_split(files)
    if not groups["train"]:
        pool = read_lines(files)
        names = ", ".join(file.name for file in files)
        return Corpus(
            name=f"text {path.name}: {names}, split 90/5/5 by the lines' checksums",
            test_name=f"5 % of the lines of {names}, chosen by checksum",
            identity=file_identity(files),
            train=split_by_hash(pool, "train"),
            valid=split_by_hash(pool, "valid"),
            test=split_by_hash(pool, "test"),
        )
    train = read_lines(groups["train"])
    held_out = tuple(split for split in ("valid", "test") if not groups[split])
    streams = {
        split: split_by_hash(train, split, held_out=held_out) if split in held_out else read_lines(groups[split])
        for split in ("valid", "test")
    }
    return Corpus(
        name=f"text {path.name}: {', '.join(file.name for file in groups['train'])}",
        test_name=(
            "5 % of the training lines, chosen by checksum"
            if "test" in held_out
            else ", ".join(file.name for file in groups["test"])
        ),
        identity=file_identity(files),
        train=split_by_hash(train, "train", held_out=held_out) if held_out else train,
        valid=streams["valid"],
        test=streams["test"],
    )
