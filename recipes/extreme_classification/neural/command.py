"""The command line of the neural models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from recipes.extreme_classification.neural.options import NeuralOptions, preset_defaults
from recipes.extreme_classification.neural.run import run_model
from recipes.extreme_classification.options import DataOptions, load_data
from recipes.one_billion_word.errors import RecipeError


def run(kind: str, arguments: list[str]) -> dict[str, Any]:
    """Options in, model and results out; what `run_model` returns. Raises RecipeError for what cannot be used."""
    data, options = parse(kind, arguments)
    folder = Path(options.output_dir or f"runs/extreme_classification_{kind}")
    return run_model(kind, load_data(data), options, folder)


def parse(kind: str, arguments: list[str]) -> tuple[DataOptions, NeuralOptions]:
    """The options; those of a preset where they are not given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    parser = HfArgumentParser(
        (DataOptions, NeuralOptions),  # pyright: ignore
        prog=f"python -m recipes.extreme_classification --model {kind}",
        allow_abbrev=False,
    )
    parser.set_defaults(**preset_defaults(first.parse_known_args(arguments)[0].preset))
    data, options, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        raise RecipeError(f"not understood: {' '.join(unknown)}; --help lists the options")
    return data, options
