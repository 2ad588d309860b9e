"""Lines of plain or gzipped text, numbered, with a progress bar on long files."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from recipes.common.errors import RecipeError

LINES_BETWEEN_UPDATES = 2_000


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file without their ends, numbered from 1.

    Files that end in .gz are unpacked on the way. On a terminal, a bar over the bytes read appears after three seconds.

    Raises:
        RecipeError: the file is missing or cut short, or a line is not UTF-8; it names the file and the line.
    """
    number = 0
    try:
        with (
            open(path, "rb") as packed,
            tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, delay=3, disable=None) as bar,
        ):
            lines = io.BufferedReader(gzip.GzipFile(fileobj=packed)) if path.suffix == ".gz" else packed  # pyright: ignore
            for number, line in enumerate(lines, start=1):
                if number % LINES_BETWEEN_UPDATES == 0:
                    bar.update(packed.tell() - bar.n)
                yield number, line.decode("utf-8").rstrip("\r\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # gzip's own error is an OSError
        raise malformed(path, max(number, 1), f"cannot be read as UTF-8 text ({error})") from error


def malformed(path: Path, number: int, reason: str) -> RecipeError:
    """The error for a line that cannot be used."""
    return RecipeError(f"{path}, line {number}: {reason}")
