"""The command line of the neural models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recipes.common import command_line
from recipes.extreme_classification.neural.options import NeuralOptions, preset_defaults
from recipes.extreme_classification.neural.run import run_model
from recipes.extreme_classification.options import DataOptions, load_data


def run(kind: str, arguments: list[str]) -> dict[str, Any]:
    """Options in, model and results out; what `run_model` returns. Raises RecipeError for what cannot be used."""
    data, options = parse(kind, arguments)
    folder = Path(options.output_dir or f"runs/extreme_classification_{kind}")
    return run_model(kind, load_data(data), options, folder)


def parse(kind: str, arguments: list[str]) -> tuple[DataOptions, NeuralOptions]:
    """The options; those of a preset where they are not given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    defaults = preset_defaults(first.parse_known_args(arguments)[0].preset)
    program = f"python -m recipes.extreme_classification --model {kind}"
    data, options = command_line.parse(
        (DataOptions, NeuralOptions), program, "Train and measure a neural model.", defaults, arguments
    )
    return data, options
