"""Checkpoints that are there whole or not at all, and which of them a killed run goes on from, if they are its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from recipes.common.errors import RecipeError
from recipes.common.processes import shard_on_cpu

DESCRIPTION = "run.json"
STATE = "trainer_state.json"
ASIDE = "_unfinished"  # the Trainer uploads nothing whose name begins so


class CheckpointedTrainer(Trainer):
    """The Trainer, whose checkpoints are there whole or not at all.

    One is written in a folder aside, by all processes, and renamed when all have written; older ones are removed after
    that. A kill at any time leaves the last whole checkpoint.
    """

    _saving = False

    def create_accelerator_and_postprocess(self) -> None:
        shard_on_cpu()
        super().create_accelerator_and_postprocess()

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / ASIDE, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(folder / ASIDE / name):
            self.state.best_model_checkpoint = str(folder / name)
        if self.args.should_save:
            self.state.save_to_json(str(folder / ASIDE / name / STATE))
            _put_in_place(folder / ASIDE / name, folder / name)
            self._remove_older(folder)
            shutil.rmtree(folder / ASIDE)
        self.accelerator.wait_for_everyone()

    def _remove_older(self, folder: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or limit < 0:
            return
        for path in numbered_checkpoints(folder)[:-limit]:
            if str(path) != best:
                # Renamed first: what is half removed has no checkpoint's name.
                path.rename(folder / ASIDE / path.name)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends without an error."""
    aside = path.with_name(path.name + ".unfinished")
    yield aside
    _put_in_place(aside, path)


def _put_in_place(aside: Path, path: Path) -> None:
    """Rename, after what was written has reached the disk."""
    for each in [*aside.rglob("*"), aside]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if path.is_dir():
        # A folder is not replaced by a rename.
        path.rename(aside.with_name(f"replaced-{path.name}"))
    os.replace(aside, path)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-STEP` in the folder, by their steps."""
    paths = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step; one that the stock Trainer was writing when killed is passed over."""
    for path in reversed(numbered_checkpoints(folder)):
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
    with written_aside(folder / DESCRIPTION) as path:
        path.write_text(json.dumps(description, indent=2) + "\n")
