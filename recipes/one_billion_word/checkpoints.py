"""Which checkpoint a killed run goes on from, and whether it is a checkpoint of the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.one_billion_word.errors import RecipeError

DESCRIPTION = "run.json"
STATE = "trainer_state.json"  # the Trainer writes it last, so a checkpoint that has it whole is whole


def find_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step; one that was being written when the run was killed is passed over."""
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / STATE).read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return path
    return None


def check_description(folder: Path, description: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse to mix two runs in one folder.

    Args:
        folder: where the run writes.
        description: what has to be the same for a checkpoint to belong to this run.
        resume: whether an earlier run is meant to go on.

    Raises:
        RecipeError: the folder holds checkpoints and `resume` was not asked for, or those of a different run.
    """
    if find_checkpoint(folder) is None:
        return
    if not resume:
        raise RecipeError(
            f"{folder} holds checkpoints of an earlier run: add --resume to go on from the last, "
            "or give another --output_dir"
        )
    path = folder / DESCRIPTION
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    different = [name for name, value in description.items() if earlier.get(name) != value]
    if different:
        changes = ", ".join(f"{name} was {earlier.get(name)!r} and is {description[name]!r}" for name in different)
        raise RecipeError(f"the checkpoints in {folder} belong to another run: {changes}")


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Keep what `check_description` compares."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
