"""Losses by name: each a short function of (`LazyLogits`, labels) with one number a row, and a config dataclass."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    """A loss of the registry, and what the table of losses says of it."""

    function: Callable[..., Tensor]
    config: type
    formula: str
    statistics: tuple[str, ...]
    source: str
    call_options: tuple[str, ...]  # options of `F.cross_entropy` that the function takes


_REGISTRY: dict[str, Entry] = {}


def register(
    name: str, config: type, *, formula: str = "", statistics: tuple[str, ...] = (), source: str = ""
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register `function(logits, labels, config, **call_options) -> rows` under a name; `config` is a dataclass.

    formula, statistics, source: the loss in a line, the names of the row statistics that it asks for, and its paper.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"a loss named {name!r} is registered already")
        _REGISTRY[name] = Entry(function, config, formula, statistics, source, _keywords(function))
        return function

    return decorate


def _keywords(function: Callable[..., Tensor]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def list_losses() -> list[str]:
    """The names that `xhead.patch(model, loss=...)` knows, sorted."""
    return sorted(_REGISTRY)


def describe_loss(name: str) -> Entry:
    """The registry's entry of that name."""
    return _REGISTRY[name]


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss of the registry with its options: `loss(logits, labels, **call_options) -> rows (n,)`."""

    name: str
    config: Any

    def __call__(self, logits: Any, labels: Tensor, **call_options: Any) -> Tensor:
        entry = _REGISTRY[self.name]
        _refuse([option for option in call_options if option not in entry.call_options], self.name)
        return entry.function(logits, labels, self.config, **call_options)


@dataclass(frozen=True)
class UserLoss:
    """A user's own `loss(logits, labels) -> rows (n,)`."""

    function: Callable[[Any, Tensor], Tensor]

    def __call__(self, logits: Any, labels: Tensor, **call_options: Any) -> Tensor:
        _refuse(list(call_options), getattr(self.function, "__name__", self.function))
        return self.function(logits, labels)


def _refuse(call_options: list[str], name: Any) -> None:
    if call_options:
        raise ValueError(
            f"cross-entropy was called with {', '.join(call_options)}, which the loss {name!r} does not take; call it "
            'without, or patch with loss="cce"'
        )


def get_loss(loss: str | Callable[[Any, Tensor], Tensor], **options: Any) -> RegisteredLoss | UserLoss:
    """The loss of that name with those options, or the callable itself.

    Raises ValueError for an unknown name, an unknown option, or options given to a callable, and what the loss's config
    raises for a value that it does not allow.
    """
    if callable(loss):
        if options:
            raise ValueError(
                f"options {', '.join(options)} go with a loss named by a string; bind them to your function with "
                "functools.partial"
            )
        return UserLoss(loss)
    if loss not in _REGISTRY:
        raise ValueError(f"unknown loss {loss!r}; known are {', '.join(list_losses())}, or give a callable")
    config = _REGISTRY[loss][1]
    known = [field.name for field in fields(config)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)} for loss {loss!r}; known are {', '.join(known)}")
    return RegisteredLoss(loss, config(**options))


from xhead.losses import cross_entropy, ldr, moments, multilabel, probability, robust, stablemax  # noqa: E402, F401
