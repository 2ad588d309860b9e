"""Tables and JSON files of results."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose columns line up when read as plain text too; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {row}")
    widths = [max(len(column), 3, *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    lines = [
        _line([column.ljust(width) for column, width in zip(columns, widths, strict=True)]),
        _line(["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]),
    ]
    for row in cells:
        lines.append(
            _line([cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))])
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def save_json(path: Path, record: Mapping[str, object]) -> None:
    """Write a record whole or not at all: an interrupted run leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def power_of_two(value: float | None) -> str:
    """`2^-12` for 2**-12, `off` for no filter, else the number."""
    if not value:
        return "off"
    mantissa, exponent = value.hex().split("p")
    return f"2^{int(exponent)}" if float.fromhex(mantissa + "p0") == 1.0 else f"{value:.3g}"


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"
