"""`--model classifier`."""

from __future__ import annotations

from typing import Any

from recipes.extreme_classification.neural import command
from recipes.extreme_classification.neural.model import CLASSIFIER


def run(arguments: list[str]) -> dict[str, Any]:
    """Train, export, measure: see `recipes.extreme_classification.neural.run`."""
    return command.run(CLASSIFIER, arguments)
