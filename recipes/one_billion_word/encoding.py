"""Sentences as numbers on disk: one flat array of word ids, and where each sentence starts in it.

The benchmark's 0.8 billion words do not fit in a list, so ids go to a file as they are made and are mapped, not read.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.common.checkpoints import written_aside
from recipes.common.errors import RecipeError
from recipes.one_billion_word.vocabulary import Vocabulary

FLUSH_EVERY = 1 << 20


@dataclass(frozen=True)
class Encoded:
    """Sentences of a split.

    Attributes:
        tokens: (T,) int32: `<S> word ... word </S>` of every sentence, one after the other.
        starts: (S + 1,) int64: where each sentence begins in `tokens`; the last entry is T.
        blank_lines: lines without a word, left out.
    """

    tokens: np.ndarray
    starts: np.ndarray
    blank_lines: int = 0

    @property
    def sentences(self) -> int:
        return len(self.starts) - 1

    @property
    def predicted(self) -> int:
        """Every token but the `<S>` that opens a sentence is predicted."""
        return len(self.tokens) - self.sentences


def encode(lines: Iterable[str], vocabulary: Vocabulary, folder: Path, *, join_lines: bool = False) -> Encoded:
    """Encode lines into files in `folder` and map them.

    Args:
        lines: one sentence a line.
        vocabulary: gives the ids.
        folder: made if missing; holds tokens.bin, starts.npy and complete.json, which is written last.
        join_lines: the lines belong together: one `<S>` at the very start, `</S>` behind every line, blank ones too.

    Raises:
        RecipeError: no line has a word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = array("q", [0])
    buffer = array("i", [vocabulary.start] if join_lines else [])
    written = blank = words = 0
    with open(folder / "tokens.bin", "wb") as file:
        for line in lines:
            ids = vocabulary.encode(line)
            words += len(ids)
            if join_lines:
                buffer.extend(ids)
                buffer.append(vocabulary.end)
            elif ids:
                buffer.append(vocabulary.start)
                buffer.extend(ids)
                buffer.append(vocabulary.end)
                starts.append(written + len(buffer))
            else:
                blank += 1
            if len(buffer) >= FLUSH_EVERY:
                written += len(buffer)
                buffer.tofile(file)
                del buffer[:]
        written += len(buffer)
        buffer.tofile(file)
    if not words:
        raise RecipeError(f"nothing to encode for {folder.name}: this split has no line with a word; give more text")
    if join_lines:
        starts.append(written)
    np.save(folder / "starts.npy", np.frombuffer(starts, dtype=np.int64))
    with written_aside(folder / "complete.json") as path:
        path.write_text(json.dumps({"blank_lines": blank}))
    return load_encoded(folder)


def is_encoded(folder: Path) -> bool:
    """Whether `encode` came to its end there."""
    return (folder / "complete.json").is_file()


def load_encoded(folder: Path) -> Encoded:
    """Map what `encode` wrote."""
    return Encoded(
        tokens=np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r"),
        starts=np.load(folder / "starts.npy", mmap_mode="r"),
        blank_lines=json.loads((folder / "complete.json").read_text())["blank_lines"],
    )
