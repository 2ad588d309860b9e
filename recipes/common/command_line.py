"""Command lines of dataclasses and of transformers' `TrainingArguments`."""

from __future__ import annotations

import json
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from recipes.common.errors import RecipeError
from recipes.common.processes import check_launch, check_training


def parse(
    kinds: tuple[type, ...], program: str, description: str, defaults: dict[str, Any], arguments: list[str] | None
) -> tuple[Any, ...]:
    """One object of each of the dataclasses; `defaults` replace theirs.

    Raises:
        RecipeError: an option is not known, a value is out of range, or the processes were started for something that
            would not happen.
    """
    check_launch()
    parser = HfArgumentParser(kinds, prog=program, description=description, allow_abbrev=False)  # pyright: ignore
    parser.set_defaults(**defaults)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except ValueError as error:  # from TrainingArguments: such as bf16 on a device without it
        raise RecipeError(str(error)) from error
    if unknown:
        raise RecipeError(f"not understood: {' '.join(unknown)}; --help lists the options")
    for each in parsed:
        if isinstance(each, TrainingArguments):
            check_training(each, resume=any(getattr(other, "resume", False) for other in parsed))
    return tuple(parsed)


def at_least(minimum: int, **values: int) -> None:
    """Raises RecipeError for the first option below the minimum."""
    for name, value in values.items():
        if value < minimum:
            raise RecipeError(f"--{name} is {value}; it must be at least {minimum}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """Options of a loss or a head, as JSON. Raises RecipeError for anything but an object."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{name} is {text!r}, which is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise RecipeError(f"{name} is {text!r}; it must be a JSON object of option names")
    return options
