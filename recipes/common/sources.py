"""The sources of the Python installation, as text that is always there."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


def standard_library() -> Path:
    """Where the standard library's sources are."""
    return Path(sysconfig.get_paths()["stdlib"])


def syntax_trees(root: Path) -> Iterator[ast.Module]:
    """Of each file below the folder, in the order of file names; parsed, not imported, so no module's code runs."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            continue
        try:
            yield ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates and files of another version lie among the sources
            continue
