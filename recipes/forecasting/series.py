"""Time series: read from CSV files, or made up."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.common.errors import RecipeError


@dataclass(frozen=True)
class Series:
    """Series with their names, each a line of numbers; NaN where a value is missing."""

    source: str
    values: dict[str, np.ndarray]


def load_series(path: str | None, made_series: int, made_length: int) -> Series:
    """The numeric columns of a CSV file, or of all CSV files of a folder; without a path, made-up series.

    Raises:
        RecipeError: there is no such file, or no column of numbers in it.
    """
    if path is None:
        return made_up(made_series, made_length)
    place = Path(path)
    files = [place] if place.is_file() else sorted(each for each in place.glob("*.csv*") if _is_csv(each))
    if not files or not all(_is_csv(file) for file in files):
        raise RecipeError(f"--data {path} is no .csv or .csv.gz file, and no folder with such files")
    values: dict[str, np.ndarray] = {}
    for file in files:
        found = _columns(file)
        prefix = f"{file.name.split('.')[0]}:" if len(files) > 1 else ""
        values |= {f"{prefix}{name}": column for name, column in found.items()}
    if not values:
        raise RecipeError(f"--data {path} has no column of numbers; a header and one line a time step are expected")
    return Series(place.name, values)


def _is_csv(path: Path) -> bool:
    return path.name.endswith((".csv", ".csv.gz"))


def _columns(file: Path) -> dict[str, np.ndarray]:
    """The columns of numbers. One with anything else in it (dates, names) is left out; an empty cell is missing."""
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            header, *rows = list(csv.reader(lines))  # type: ignore[arg-type]
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read as CSV: {error}") from error
    columns = {}
    for index, name in enumerate(header):
        try:
            cells = [row[index].strip() if index < len(row) else "" for row in rows if row]
            columns[name] = np.array([float(cell) if cell else np.nan for cell in cells])
        except ValueError:
            continue
    return columns


def made_up(number: int, length: int, seed: int = 0) -> Series:
    """Days of 24 steps: two waves, a slow drift, and noise that grows with the level and sometimes jumps."""
    rng = np.random.default_rng(seed)
    hours = np.arange(length)
    values = {}
    for index in range(number):
        level, day, half, phase = rng.uniform(2, 20), rng.uniform(0.2, 0.8), rng.uniform(0, 0.4), rng.uniform(0, 24)
        wave = day * np.sin(2 * np.pi * (hours + phase) / 24) + half * np.sin(2 * np.pi * (hours + 2 * phase) / 12)
        drift = np.cumsum(rng.normal(0, 0.01, length))
        noise = rng.normal(0, 0.1, length) * (1 + 0.8 * wave) + rng.choice([0, -0.6, 0.6], length, p=[0.94, 0.03, 0.03])
        values[f"made-{index}"] = level * (1 + wave + drift + noise)
    return Series("made up", values)
