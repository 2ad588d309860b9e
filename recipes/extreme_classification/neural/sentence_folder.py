"""What a folder of sentence-transformers says: where the transformer is, how it is pooled, unit vectors or not.

`modules.json` lists the modules in order, each with its `type` and `path`: the transformer and its tokenizer, in the
folder itself or in one below it; the pooling, whose config.json has `pooling_mode`, or in older versions
`pooling_mode_mean_tokens` and alike; and unit vectors, if they are wanted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError

POOLINGS = ("mean", "cls")
_KNOWN = ("Transformer", "Pooling", "Normalize")
_OLD_NAMES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class SentenceFolder:
    """Of an encoder: the folder of its transformer, `mean` or `cls`, and whether its vectors are unit vectors."""

    transformer: str
    pooling: str
    normalise: bool


def sentence_folder(encoder: str) -> SentenceFolder | None:
    """What the folder says; None for anything but a folder with modules.json.

    Raises:
        RecipeError: modules, a pooling or settings that have no equal here.
    """
    folder = Path(encoder)
    if not (folder / "modules.json").is_file():
        return None
    modules = _json(folder / "modules.json", list)
    try:
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        paths = [folder / module["path"] for module in modules]
    except (TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"{folder / 'modules.json'} is no list of modules with `type` and `path`") from error
    if kinds not in ([*_KNOWN], [*_KNOWN[:2]]):
        raise RecipeError(
            f"{folder / 'modules.json'} has the modules {', '.join(kinds) or 'of nothing'}; what can be read is "
            f"{', '.join(_KNOWN[:2])} and, maybe, {_KNOWN[2]}"
        )
    lowers = paths[0] / "sentence_bert_config.json"
    if lowers.is_file() and _json(lowers, dict).get("do_lower_case"):
        raise RecipeError(f"{lowers} says do_lower_case: let the tokenizer do it, and set it to false there")
    return SentenceFolder(str(paths[0]), _pooling(paths[1] / "config.json"), len(kinds) == len(_KNOWN))


def transformer_of(encoder: str) -> str:
    """The folder or name to load transformer and tokenizer from."""
    found = sentence_folder(encoder)
    return encoder if found is None else found.transformer


def _pooling(path: Path) -> str:
    config = _json(path, dict)
    names = config.get("pooling_mode")
    if names is None:
        names = [
            _OLD_NAMES.get(key, key) for key, wanted in config.items() if key.startswith("pooling_mode_") and wanted
        ]
    names = [names] if isinstance(names, str) else list(names)
    if len(names) != 1 or names[0] not in POOLINGS:
        raise RecipeError(
            f"{path} asks for the pooling {', '.join(map(str, names)) or 'of nothing'}; it must be one of "
            f"{', '.join(POOLINGS)}"
        )
    return names[0]


def _json(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, kind):
        raise RecipeError(f"{path} must hold a JSON {'list' if kind is list else 'object'}")
    return found
