"""A probabilistic label tree, as napkinXC trains it: a second linear opponent, from a package of its own.

On the same features as the linear model; it reads no label text.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.command_line import parse
from recipes.common.errors import RecipeError
from recipes.extreme_classification.evaluation import Clock, measure, ranks_needed, write_evaluation
from recipes.extreme_classification.features import make_features
from recipes.extreme_classification.options import DataOptions, load_data
from xhead.retrieval.metrics import NONE


@dataclass
class LabelTreeOptions:
    """The tree."""

    output_dir: str = field(default="runs/extreme_classification_label_tree", metadata={"help": "For the report."})
    characters: int = field(default=5, metadata={"help": "Length of character n-grams as features; 0 for none."})
    cost: float = field(default=10.0, metadata={"help": "C of the logistic regressions."})
    trees: int = field(default=1, metadata={"help": "Average so many trees."})
    threads: int = field(default=0, metadata={"help": "0 for one a core."})
    seed: int = field(default=0, metadata={"help": "Of the clustering."})

    def __post_init__(self) -> None:
        for name, minimum in (("characters", 0), ("trees", 1), ("threads", 0), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise RecipeError(f"--{name} is {getattr(self, name)}; it must be at least {minimum}")
        if not self.cost > 0:
            raise RecipeError(f"--cost is {self.cost}; it must be positive")


def run(name: str, arguments: list[str]) -> dict[str, Any]:
    """Train, predict, report; the model is called by `name` there.

    Returns:
        What is written to results.json.

    Raises:
        RecipeError: an option or the data cannot be used, or napkinXC is not installed.
    """
    program = f"python -m recipes.extreme_classification --model {name}"
    data, options = parse(
        (DataOptions, LabelTreeOptions),
        program,
        "Train and measure napkinXC's probabilistic label tree.",
        {},
        arguments,
    )
    try:
        napkin = importlib.import_module("napkinxc.models")
    except ImportError as error:
        raise RecipeError("--model label_tree needs napkinXC: pip install napkinxc, or take --model linear") from error
    splits = load_data(data)
    clock = Clock()
    features = make_features(splits, options.characters)
    with tempfile.TemporaryDirectory() as folder:
        tree = napkin.PLT(
            folder, liblinear_c=options.cost, ensemble=options.trees, threads=options.threads, seed=options.seed
        )
        tree.fit(features.train, splits.train.labels)
        found = tree.predict(features.test, top_k=ranks_needed(splits))
    predictions = np.full((len(found), ranks_needed(splits)), NONE, np.int64)
    for row, labels in enumerate(found):
        predictions[row, : len(labels)] = labels
    return write_evaluation(
        measure(splits, predictions), Path(options.output_dir), model=name, options=asdict(options), clock=clock
    )
