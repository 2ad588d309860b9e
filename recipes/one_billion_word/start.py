"""Start from the model of an earlier run."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from recipes.common.errors import RecipeError
from recipes.one_billion_word.options import ModelOptions
from recipes.one_billion_word.vocabulary import Vocabulary


def load_start(model: PreTrainedModel, options: ModelOptions, vocabulary: Vocabulary) -> None:
    """Give the model the weights of the run that `--start_from` names; nothing without the option.

    Raises:
        RecipeError: there is no model, or it has other words, other shapes or another head.
    """
    if options.start_from is None:
        return
    folder = Path(options.start_from)
    if not (folder / "model" / "config.json").is_file():
        raise RecipeError(f"--start_from is {options.start_from}: {folder / 'model'} holds no model of an earlier run")
    words = folder / "vocabulary.txt"
    if not words.is_file() or Vocabulary.read(words).fingerprint != vocabulary.fingerprint:
        raise RecipeError(f"--start_from is {options.start_from}, whose words are not those of this data; use its own")
    trained = type(model).from_pretrained(folder / "model")
    if getattr(trained.config, "xhead_head", None):
        raise RecipeError(f"--start_from is {options.start_from}, whose model has no linear head; give one that has")
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise RecipeError(f"--start_from is {options.start_from}, whose model has another shape: {error}") from error
