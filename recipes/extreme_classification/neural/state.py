"""The state of a run after an epoch: a folder that is there whole or not at all, for any number of processes.

In `epoch-3`, the main process writes training.pt: the model, its optimiser and how far it is, without what has a row a
label. That, of the optimiser too, is in labels-START-STOP-of-LABELS.safetensors, from each process the labels it holds.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from recipes.common.checkpoints import written_aside
from recipes.extreme_classification.neural.model import XmcModel
from xhead.heads.label_shards import load_label_rows, save_label_rows

_TRAINING = "training.pt"
_WHOLE = re.compile(r"epoch-(\d+)")


def checkpoint(folder: Path, epoch: int) -> Path:
    """Where the state after an epoch is."""
    return folder / f"epoch-{epoch}"


def last_checkpoint(folder: Path) -> Path | None:
    """The one of the latest epoch."""
    epochs = [int(match[1]) for path in folder.glob("epoch-*") if (match := _WHOLE.fullmatch(path.name))]
    return checkpoint(folder, max(epochs)) if epochs else None


def remove_checkpoints(folder: Path, keep: tuple[Path, ...] = ()) -> None:
    """All but some, and what a killed run has left of one."""
    for path in folder.glob("epoch-*"):
        if path not in keep and _WHOLE.fullmatch(path.name.removesuffix(".unfinished")):
            shutil.rmtree(path)


def save(
    path: Path, model: XmcModel, optimizer: torch.optim.Optimizer, state: PartialState, more: dict[str, Any]
) -> None:
    """Write a checkpoint; all processes call it. more: for `load` to give back"""
    kept, moments, rows = _parts(model, optimizer)
    with folder_of_all(path, state) as aside:
        if state.is_main_process or model.vocabulary is not None:
            save_label_rows(aside, rows, *model.range, model.labels)
        if state.is_main_process:
            torch.save({"model": kept, "optimizer": moments, **more}, aside / _TRAINING)


def load(path: Path, model: XmcModel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a checkpoint back; returns what `save` was given. optimizer: None leaves it as it is"""
    saved = torch.load(path / _TRAINING, weights_only=True, map_location="cpu")
    kept, moments = saved.pop("model"), saved.pop("optimizer")
    rows = load_label_rows(path, *model.range) if model.label_tensors else {}
    kept.update({name: rows[name] for name in model.label_tensors})
    model.load_state_dict(kept)
    if optimizer is not None:
        for place, name in _label_parameters(model, optimizer):
            whole = {key.removeprefix(f"{name}."): value for key, value in rows.items() if key.startswith(f"{name}.")}
            if whole:
                moments["state"][place].update(whole)
        optimizer.load_state_dict(moments)
    return saved


@contextmanager
def folder_of_all(path: Path, state: PartialState) -> Iterator[Path]:
    """A folder for all processes to write in, which is called `path` once all of them have."""
    if state.is_main_process:
        with written_aside(path) as aside:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            state.wait_for_everyone()
            yield aside
            state.wait_for_everyone()
    else:
        state.wait_for_everyone()
        yield path.with_name(path.name + ".unfinished")
        state.wait_for_everyone()
    state.wait_for_everyone()


def _parts(
    model: XmcModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """The state of the model and of the optimiser, without what has a row a label; and that, by name."""
    kept, moments = dict(model.state_dict()), optimizer.state_dict()
    rows = {name: kept.pop(name) for name in model.label_tensors}
    for place, name in _label_parameters(model, optimizer):
        of_parameter = moments["state"].get(place, {})
        by_label = {key: value for key, value in of_parameter.items() if value.shape == rows[name].shape}
        moments["state"][place] = {key: value for key, value in of_parameter.items() if key not in by_label}
        rows |= {f"{name}.{key}": value for key, value in by_label.items()}
    return kept, moments, rows


def _label_parameters(model: XmcModel, optimizer: torch.optim.Optimizer) -> list[tuple[int, str]]:
    """Where the optimiser's state has the parameters with a row a label, and their names."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in model.label_tensors}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(place, names[id(parameter)]) for place, parameter in enumerate(parameters) if id(parameter) in names]
