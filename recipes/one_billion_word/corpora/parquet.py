"""Parquet copies of a corpus, local or by dataset name, read through `datasets` with a column `text`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError
from recipes.one_billion_word.corpora.corpus import Corpus, Lines, file_identity, split_by_hash
from recipes.one_billion_word.corpora.text import group_by_split

COLUMN = "text"
HUB_VALID_ONE_IN = 3000  # about 10,000 of the benchmark's 30.3 million training sentences


def parquet_files(path: Path) -> list[Path]:
    """The parquet files that `path` is or holds, at any depth, in the order of their names."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.rglob("*.parquet"))


def parquet_corpus(path: Path) -> Corpus:
    """Local parquet files as a corpus; names with train, valid or dev, and test say which split a file belongs to."""
    files = parquet_files(path)
    groups = {split: group for split, group in group_by_split(files).items() if group}
    if "train" not in groups:
        groups = {"train": files}
    splits = {split: _local_lines(group) for split, group in groups.items()}
    return _corpus(f"parquet {path.name}", splits, file_identity(files), one_in=20)


def hub_corpus(name: str, forms: str) -> Corpus:
    """A dataset by its name; downloaded once and kept by `datasets`.

    Raises:
        RecipeError: it cannot be loaded. Script datasets such as lm1b itself are refused by datasets >= 4.
    """
    datasets = _module("datasets")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:
        raise RecipeError(
            f"--data {name!r} is no folder here, and as a dataset it could not be loaded: {error}\n{forms}"
        ) from error
    splits = {("valid" if split == "validation" else str(split)): _dataset_lines(loaded[split]) for split in loaded}
    if "train" not in splits:
        raise RecipeError(f"dataset {name!r} has the splits {', '.join(splits)}; a split `train` is needed")
    identity = "-".join(str(loaded[split]._fingerprint) for split in loaded)
    large = loaded["train"].num_rows > 20 * HUB_VALID_ONE_IN
    return _corpus(f"dataset {name}", splits, identity, one_in=HUB_VALID_ONE_IN if large else 20)


def _corpus(name: str, splits: Mapping[str, Lines], identity: str, one_in: int) -> Corpus:
    train = splits["train"]
    held_out = tuple(split for split in ("valid", "test") if split not in splits)

    def stream(split: str) -> Lines:
        return split_by_hash(train, split, held_out=held_out, one_in=one_in) if held_out else train

    test_name = f"one training line in {one_in}, chosen by checksum"
    if "test" in splits:
        # The copies of the benchmark have all 50 held-out files in `test`; the published numbers are on one of them.
        test_name = f"the whole test split of {name}: near the published test set of the benchmark only if that is it"
    return Corpus(
        name=name,
        test_name=test_name,
        identity=identity,
        train=stream("train"),
        valid=splits.get("valid") or stream("valid"),
        test=splits.get("test") or stream("test"),
    )


def _local_lines(files: Sequence[Path]) -> Lines:
    def stream() -> Iterator[str]:
        parquet = _module("pyarrow.parquet")
        for file in files:
            try:
                opened = parquet.ParquetFile(file)
            except ValueError as error:  # what pyarrow's own error for broken files is derived from
                raise RecipeError(f"{file} cannot be read as parquet: {error}") from error
            if COLUMN not in opened.schema_arrow.names:
                raise RecipeError(f"{file} has the columns {opened.schema_arrow.names}; a column {COLUMN!r} is needed")
            for batch in opened.iter_batches(columns=[COLUMN]):
                yield from batch.column(0).to_pylist()

    return stream


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(f"parquet and datasets need {name.split('.')[0]}: pip install -e '.[data]'") from error


def _dataset_lines(dataset: Any) -> Lines:
    if COLUMN not in dataset.column_names:
        raise RecipeError(f"the dataset has the columns {dataset.column_names}; a column {COLUMN!r} is needed")

    def stream() -> Iterator[str]:
        for batch in dataset.iter(batch_size=1000):
            yield from batch[COLUMN]

    return stream
