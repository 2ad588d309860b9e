"""Choose a model; it reads the rest of the command line."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from recipes.common.errors import RecipeError

MODELS = {  # a name, and the module whose `run(name, other arguments)` is called; imported only when chosen
    "linear": "recipes.extreme_classification.linear",
    "classifier": "recipes.extreme_classification.neural.command",
    "dual_encoder": "recipes.extreme_classification.neural.command",
    "label_tree": "recipes.extreme_classification.label_tree",
}


def main(arguments: list[str] | None = None) -> None:
    """The command. What the user got wrong ends it with status 2."""
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m recipes.extreme_classification",
        description="Train a model on an extreme-classification data set and measure it. --model NAME --help lists "
        "the options of a model.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="linear", help=f"one of {', '.join(MODELS)}")
    chosen, rest = parser.parse_known_args(arguments)
    try:
        if chosen.model not in MODELS:
            raise RecipeError(f"--model is {chosen.model!r}; known: {', '.join(MODELS)}")
        importlib.import_module(MODELS[chosen.model]).run(chosen.model, rest)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
