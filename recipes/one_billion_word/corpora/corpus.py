"""A corpus is three streams of lines, one sentence a line, tokens separated by white space."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

SPLITS = ("train", "valid", "test")

Lines = Callable[[], Iterator[str]]  # opens the stream anew at each call: corpora need not fit in memory


@dataclass(frozen=True)
class Corpus:
    """Three splits of sentences and what to call them in a report.

    Attributes:
        name: the data, in words.
        test_name: which sentences the test perplexity is about. Perplexities on different test sets do not compare.
        identity: changes whenever the sentences may have changed; encoded copies are kept under it.
        train, valid, test: each opens its lines anew when called.
    """

    name: str
    test_name: str
    identity: str
    train: Lines
    valid: Lines
    test: Lines

    def lines(self, split: str) -> Iterator[str]:
        """The lines of a split, from its first."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; a corpus has {', '.join(SPLITS)}")
        return getattr(self, split)()

    def with_valid_limit(self, sentences: int) -> Corpus:
        """The same corpus with at most so many sentences in `valid`: a held-out part can be larger than is worth
        scoring every few hundred steps. The test split is never cut."""
        valid = self.valid
        return replace(
            self,
            valid=lambda: itertools.islice(valid(), sentences),
            identity=f"{self.identity}-valid{sentences}",
        )


def split_by_hash(lines: Lines, part: str, *, held_out: tuple[str, ...] = ("valid", "test"), one_in: int = 20) -> Lines:
    """The lines of `lines` that belong to `part`, where each held-out part gets one line in `one_in`.

    The line's own checksum decides, so the split does not depend on the order or number of the lines, and a sentence
    that occurs twice never lies on both sides.
    """
    wanted = held_out.index(part) if part in held_out else None

    def stream() -> Iterator[str]:
        for line in lines():
            bucket = zlib.crc32(line.strip().encode()) % one_in
            if bucket == wanted or (wanted is None and bucket >= len(held_out)):
                yield line

    return stream


def file_identity(paths: Iterable[Path]) -> str:
    """A digest of names, sizes and times of modification: cheap even for a hundred shards."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
