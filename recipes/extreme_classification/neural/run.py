"""Train, export and measure a neural model, and use an exported one on new texts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file
from transformers import AutoTokenizer

from recipes.extreme_classification.dataset import Splits
from recipes.extreme_classification.evaluation import measure, ranks_needed, write_evaluation
from recipes.extreme_classification.neural.encoders import make_encoder, make_tokenizer, tokenize
from recipes.extreme_classification.neural.model import DUAL_ENCODER, XmcModel
from recipes.extreme_classification.neural.options import NeuralOptions
from recipes.extreme_classification.neural.training import BEST, LAST, Documents, Training, predict
from recipes.one_billion_word.errors import RecipeError
from xhead.retrieval import topk

DESCRIPTION, VECTORS, LABEL_TEXTS = "options.json", "labels.safetensors", "labels.txt"


def run_model(kind: str, splits: Splits, options: NeuralOptions, folder: Path) -> dict[str, Any]:
    """Train on the training split, export the best model to the folder, and measure it on the test split.

    Args:
        kind: `classifier` or `dual_encoder`.
        splits: the data set, with texts.
        options: of the model and its training.
        folder: where the model, its checkpoints and results.json go.

    Returns:
        What results.json holds.

    Raises:
        RecipeError: the data set has no texts of documents, or of labels where these are encoded.
    """
    train, test = splits.train, splits.test
    if train.texts is None or test.texts is None:
        raise RecipeError(f"--model {kind} reads texts, and {splits.name} has features only: use --model linear")
    if kind == DUAL_ENCODER and train.label_texts is None:
        raise RecipeError(f"--model {kind} reads label texts, and {splits.name} has none: use --model classifier")
    torch.manual_seed(options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    label_texts = train.label_texts
    kept = folder / "tokenizer"
    if options.resume and (folder / LAST).is_file():  # a tokenizer trained again may number its tokens otherwise
        tokenizer = AutoTokenizer.from_pretrained(kept)
    else:
        tokenizer = make_tokenizer(options, [*train.texts, *(label_texts or ())])
        tokenizer.save_pretrained(kept)
    label_inputs = None
    if kind == DUAL_ENCODER and label_texts is not None:
        label_inputs = tokenize(tokenizer, label_texts, options.max_length)
    model = XmcModel(kind, make_encoder(options, tokenizer), options, train.shape[1], label_inputs)
    (folder / DESCRIPTION).write_text(json.dumps({"kind": kind, "labels": train.shape[1], **asdict(options)}, indent=1))
    if label_texts is not None:
        (folder / LABEL_TEXTS).write_text("".join(" ".join(text.split()) + "\n" for text in label_texts))

    start = time.perf_counter()
    documents = Documents(tokenize(tokenizer, train.texts, options.max_length), train.labels)
    training = Training(model, options, documents, folder)
    training.run()
    seconds = time.perf_counter() - start
    model.eval()
    save_file({"vectors": model.label_vectors().contiguous()}, folder / VECTORS)
    found = predict(model, tokenize(tokenizer, test.texts, options.max_length), ranks_needed(splits))[1]
    return write_evaluation(
        measure(splits, found.numpy()),
        folder,
        model=f"{kind}, {options.loss}",
        options=asdict(options),
        seconds=seconds,
        history=training.history,
    )


class Predictor:
    """An exported model: the k best labels of new texts."""

    def __init__(self, folder: Path):
        """Raises RecipeError where the folder holds no exported model."""
        if not (folder / VECTORS).is_file():
            raise RecipeError(f"{folder} holds no {VECTORS}: train a model with --output_dir {folder} first")
        description = json.loads((folder / DESCRIPTION).read_text())
        kind, labels = description.pop("kind"), description.pop("labels")
        self.options = NeuralOptions(**description)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.vectors = load_file(folder / VECTORS)["vectors"]
        encoder = make_encoder(self.options, self.tokenizer)
        # The label vectors are there: no label is encoded again.
        inputs = tokenize(self.tokenizer, ["label"] * labels, 8) if kind == DUAL_ENCODER else None
        self.model = XmcModel(kind, encoder, self.options, labels, inputs).eval()
        load_model(self.model, folder / BEST)
        names = folder / LABEL_TEXTS
        self.names = names.read_text().splitlines() if names.is_file() else [str(label) for label in range(labels)]

    def __call__(self, texts: Sequence[str], k: int = 5) -> list[list[tuple[str, float]]]:
        """For each text, the k best labels and their scores, the best first."""
        hidden = self.model.document_vectors(tokenize(self.tokenizer, texts, self.options.max_length)).float()
        found = topk(hidden, self.vectors, min(k, len(self.vectors)))
        scores = (found.scores / self.model.temperature).tolist()
        return [
            [(self.names[label], score) for label, score in zip(*row, strict=True)]
            for row in zip(found.classes.tolist(), scores, strict=True)
        ]
