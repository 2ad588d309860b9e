"""Texts that stay on disk: one a line, found by position."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from recipes.common.errors import RecipeError

BLOCK = 1 << 24  # bytes searched for line ends at a time


class MappedLines(Sequence[str]):
    """The lines of a UTF-8 file as a sequence of strings, memory-mapped: 8 bytes of memory a line.

    Args:
        path: the file. It must not change while this is in use.

    Raises:
        RecipeError: no such file; on reading, a line that is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            self._bytes = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error}") from error
        ends = [
            start + np.flatnonzero(self._bytes[start : start + BLOCK] == ord("\n")) for start in range(0, size, BLOCK)
        ]
        self._ends = np.concatenate(ends) if ends else np.empty(0, np.int64)
        if size and self._bytes[-1] != ord("\n"):
            self._ends = np.append(self._ends, size)

    def __reduce__(self) -> tuple[type[MappedLines], tuple[Path]]:
        return MappedLines, (self.path,)  # a worker process maps the file anew instead of getting its bytes

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = self._ends[position - 1] + 1 if position else 0
        try:
            return self._bytes[start : self._ends[position]].tobytes().decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{self.path}, line {position + 1}: not UTF-8 ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))


def write_lines(texts: Iterable[str], path: Path) -> MappedLines:
    """Write texts one a line, line ends inside them as spaces, and map the file; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(" ".join(text.splitlines()) + "\n" for text in texts)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return MappedLines(path)
