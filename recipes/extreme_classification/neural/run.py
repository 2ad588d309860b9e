"""Train, export and measure a neural model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file, save_model

from recipes.common.errors import RecipeError
from recipes.extreme_classification.dataset import Dataset, Splits
from recipes.extreme_classification.evaluation import Clock, measure, ranks_needed, write_evaluation
from recipes.extreme_classification.neural.documents import Documents
from recipes.extreme_classification.neural.encoders import make_encoder
from recipes.extreme_classification.neural.inputs import load_reader, make_reader
from recipes.extreme_classification.neural.model import CLASSIFIER, DUAL_ENCODER, XmcModel
from recipes.extreme_classification.neural.options import NeuralOptions
from recipes.extreme_classification.neural.processes import processes, shared_labels, sum_over_processes
from recipes.extreme_classification.neural.state import folder_of_all, last_checkpoint, remove_checkpoints
from recipes.extreme_classification.neural.training import Training, predict
from xhead.heads.label_shards import load_label_rows, save_label_rows
from xhead.retrieval import MaximumInnerProduct

DESCRIPTION, LABEL_TEXTS = "options.json", "labels.txt"
ENCODER, VECTORS, INDEX = "encoder.safetensors", "labels.safetensors", "labels.faiss"
FREE_TO_CHANGE = ("output_dir", "resume", "preset", "patience", "index", "label_chunk", "shard_labels")


def run_model(kind: str, splits: Splits, options: NeuralOptions, folder: Path) -> dict[str, Any]:
    """Train on the training split, export the best model to the folder, and measure it on the test split.

    Started by `accelerate launch`, every process calls it; the main one writes.

    Args:
        kind: `classifier` or `dual_encoder`.
        splits: the data set, with texts.
        options: of the model and its training.
        folder: where the model, its checkpoints and results.json go.

    Returns:
        What results.json holds; nothing where the process is not the main one.

    Raises:
        RecipeError: the data set has no texts of documents, or of labels where these are encoded; a run that cannot be
            gone on with.
    """
    train, test = splits.train, splits.test
    if train.texts is None or test.texts is None:
        raise RecipeError(f"--model {kind} reads texts, and {splits.name} has features only: use --model linear")
    if kind == DUAL_ENCODER and train.label_texts is None:
        raise RecipeError(f"--model {kind} reads label texts, and {splits.name} has none: use --model classifier")
    state = processes()
    vocabulary = shared_labels(train.shape[1], state, options.shard_labels)
    if kind == CLASSIFIER and options.classifier_dtype == "bfloat16" and state.num_processes > 1 and not vocabulary:
        raise RecipeError(
            "--classifier_dtype bfloat16 rounds at random, and processes that hold the same labels would part: use "
            "float32, one process, or --shard_labels True"
        )
    if options.index is not None and importlib.util.find_spec("faiss") is None:
        raise RecipeError(f"--index {options.index} needs faiss: pip install faiss-cpu")
    clock = Clock()
    torch.manual_seed(options.seed)
    with state.main_process_first():
        if state.is_main_process:
            _start(kind, train, options, folder)
        reader = load_reader(options, folder)
        tokens = folder / "tokens"
        documents, tests = reader(train.texts, tokens / "train"), reader(test.texts, tokens / "test")
        labels = reader(train.label_texts, tokens / "labels") if kind == DUAL_ENCODER and train.label_texts else None
    encoder = make_encoder(options, reader.size)
    model = XmcModel(kind, encoder, options, train.shape[1], labels, sum_over_processes, vocabulary)
    model = model.to(state.device)
    training = Training(model, options, Documents(documents, train.labels, np.arange(train.shape[0])), folder, state)
    training.run()
    if not state.is_main_process and vocabulary is None:
        return {}
    export(model, options, folder, state)
    found = predict(model, tests, ranks_needed(splits))[1]
    if not state.is_main_process:
        return {}
    return write_evaluation(
        measure(splits, found.numpy()),
        folder,
        model=f"{kind}, {options.loss}",
        options=asdict(options),
        clock=clock,
        processes=state.num_processes,
        history=training.history,
    )


def _start(kind: str, train: Dataset, options: NeuralOptions, folder: Path) -> None:
    """What reads texts, the options and the label texts, written to the folder; left as they are on resuming."""
    description = {"kind": kind, "labels": train.shape[1], **asdict(options)}
    if options.resume and last_checkpoint(folder) is not None:
        before = json.loads((folder / DESCRIPTION).read_text())
        changed = [name for name in description if name not in FREE_TO_CHANGE and before.get(name) != description[name]]
        if changed:
            name = changed[0]
            raise RecipeError(
                f"--resume goes on with the run in {folder}, where {name} is {before.get(name)!r} and not "
                f"{description[name]!r}: give the same options, or another --output_dir"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    remove_checkpoints(folder)
    label_texts = train.label_texts or ()
    make_reader(options, [*(train.texts or ()), *label_texts]).save(folder)
    if label_texts:
        (folder / LABEL_TEXTS).write_text("".join(" ".join(text.split()) + "\n" for text in label_texts))
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def export(model: XmcModel, options: NeuralOptions, folder: Path, state: PartialState) -> None:
    """Write the encoder, the label vectors over the temperature, and a faiss index of these if one is wanted.

    Processes that share the labels all call it; the main one collects the vectors, from files.
    """
    vectors = (model.label_vectors() / model.temperature).cpu().contiguous()
    if model.vocabulary is not None:
        pieces = folder / "vectors"
        if state.is_main_process:  # of a run that was killed
            shutil.rmtree(pieces, ignore_errors=True)
        with folder_of_all(pieces, state) as aside:
            save_label_rows(aside, {"vectors": vectors}, *model.range, model.labels)
        if not state.is_main_process:
            return
        vectors = load_label_rows(pieces)["vectors"]
        shutil.rmtree(pieces)
    save_model(model.encoder, str(folder / ENCODER))
    save_file({"vectors": vectors}, folder / VECTORS)
    if options.index is not None:
        index = MaximumInnerProduct(vectors, description=options.index)
        index.save(folder / INDEX)
        found = index.recall(vectors[:1000], min(5, len(vectors)))
        print(f"index {options.index}: finds {100 * found:.1f} % of the 5 nearest labels of the first 1,000")
