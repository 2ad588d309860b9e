"""`python -m recipes.extreme_classification.neural.predict FOLDER TEXT ...`: the best labels of new texts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, load_model

from recipes.common.errors import RecipeError
from recipes.extreme_classification.neural.encoders import make_encoder
from recipes.extreme_classification.neural.inputs import load_reader
from recipes.extreme_classification.neural.model import normalises
from recipes.extreme_classification.neural.options import NeuralOptions
from recipes.extreme_classification.neural.run import DESCRIPTION, ENCODER, INDEX, LABEL_TEXTS, VECTORS
from xhead.losses.vectors import unit
from xhead.retrieval import MaximumInnerProduct, topk


class Predictor:
    """An exported model: the k best labels of new texts, by its faiss index if it has one, else exact.

    Raises:
        RecipeError: the folder holds no exported model.
    """

    def __init__(self, folder: Path):
        if not (folder / VECTORS).is_file():
            raise RecipeError(f"{folder} holds no {VECTORS}: train a model with --output_dir {folder} first")
        description = json.loads((folder / DESCRIPTION).read_text())
        kind, labels = description.pop("kind"), description.pop("labels")
        options = NeuralOptions(**description)
        self.normalise = normalises(kind, options)
        self.reader = load_reader(options, folder)
        self.encoder = make_encoder(options, self.reader.size).eval()
        load_model(self.encoder, folder / ENCODER)
        self.vectors = load_file(folder / VECTORS)["vectors"]
        indexed = (folder / INDEX).is_file()
        self.index = MaximumInnerProduct.load(folder / INDEX, self.vectors) if indexed else None
        names = folder / LABEL_TEXTS
        self.names = names.read_text().splitlines() if names.is_file() else [str(label) for label in range(labels)]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], k: int = 5) -> list[list[tuple[str, float]]]:
        """For each text, the k best labels and their scores, the best first."""
        if not texts:
            return []
        hidden = self.encoder(**self.reader(texts).batch(np.arange(len(texts)))).float()
        hidden = unit(hidden) if self.normalise else hidden
        k = min(k, len(self.vectors))
        found = topk(hidden, self.vectors, k) if self.index is None else self.index.topk(hidden, k)
        return [
            [(self.names[label], score) for label, score in zip(*row, strict=True) if label >= 0]
            for row in zip(found.classes.tolist(), found.scores.tolist(), strict=True)
        ]


def main(arguments: list[str] | None = None) -> None:
    """The command. What the user got wrong ends it with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.extreme_classification.neural.predict", description="The best labels of new texts."
    )
    parser.add_argument("folder", type=Path, help="what was trained with --output_dir FOLDER")
    parser.add_argument("texts", nargs="*", help="default: a text a line of the standard input")
    parser.add_argument("--k", type=int, default=5, help="labels of a text (default %(default)s)")
    options = parser.parse_args(arguments)
    texts = options.texts or [line.strip() for line in sys.stdin if line.strip()]
    try:
        if options.k < 1:
            raise RecipeError(f"--k is {options.k}; it must be at least 1")
        found = Predictor(options.folder)(texts, options.k)
    except (RecipeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for text, labels in zip(texts, found, strict=True):
        print(text)
        for label, score in labels:
            print(f"  {score:8.3f}  {label}")


if __name__ == "__main__":
    main()
