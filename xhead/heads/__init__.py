"""Heads: what stands between the hidden states and the classes.

`"linear"` is the projection that a model comes with; every other head takes its place. `SphericalHead` is a module of
its own, with its own update; `LabelEncoderHead` and `InPlaceClassifier` are for extreme classification.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, TypeVar

from xhead.heads.base import Head

HeadType = TypeVar("HeadType", bound=type[Head])


class Entry(NamedTuple):
    """A head of the registry."""

    head: Any
    config: Any
    start_options: tuple[str, ...]  # keyword-only arguments of its `start_from`


_REGISTRY: dict[str, Entry] = {}


def register_head(name: str, config: type) -> Callable[[HeadType], HeadType]:
    """Register a subclass of `Head` under a name.

    config: a frozen dataclass of numbers, strings and None alone, since it is written to the model's config.json. It
        validates itself in `__post_init__`. Its fields, and the keyword-only arguments of the head's `start_from`, are
        the options of `xhead.patch(model, head=name, ...)`.
    """

    def decorate(head: HeadType) -> HeadType:
        if name in (*_REGISTRY, "linear"):
            raise ValueError(f"a head named {name!r} is registered already")
        parameters = inspect.signature(head.start_from).parameters.values()
        start_options = tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)
        _REGISTRY[name] = Entry(head, config, start_options)
        head.name = name
        return head

    return decorate


def list_heads() -> list[str]:
    """The names that `xhead.patch(model, head=...)` knows, sorted."""
    return sorted(("linear", *_REGISTRY))


def make_head(name: str, in_features: int, out_features: int, config: Any) -> Head:
    """A head of that name as its class makes it, before it starts from anything."""
    return _REGISTRY[name].head(in_features, out_features, config)


def read_options(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of a head, and the options of its start, from the options of a call.

    Raises ValueError for an unknown option, TypeError for one that has to be given and is not, and what the config
    raises.
    """
    entry = _REGISTRY[name]
    settable = [field for field in fields(entry.config) if field.init]
    known = [field.name for field in settable]
    unknown = [option for option in options if option not in (*known, *entry.start_options)]
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(unknown)} for head {name!r}; known are "
            f"{', '.join((*known, *entry.start_options))}"
        )
    required = [field.name for field in settable if field.default is MISSING and field.default_factory is MISSING]
    missing = [option for option in required if option not in options]
    if missing:
        raise TypeError(f"the head {name!r} needs the option {', '.join(missing)}")
    config = entry.config(**{key: value for key, value in options.items() if key in known})
    return config, {key: value for key, value in options.items() if key in entry.start_options}


from xhead.heads import fourier_vocabulary, vq  # noqa: E402, F401  register themselves
from xhead.heads.fourier import FourierHead  # noqa: E402
from xhead.heads.fourier_density import FourierDensity  # noqa: E402
from xhead.heads.in_place import InPlaceClassifier  # noqa: E402
from xhead.heads.label_encoder import LabelEncoderHead  # noqa: E402
from xhead.heads.spherical.head import SphericalHead  # noqa: E402

__all__ = [
    "FourierDensity",
    "FourierHead",
    "Head",
    "InPlaceClassifier",
    "LabelEncoderHead",
    "SphericalHead",
    "list_heads",
    "register_head",
]
