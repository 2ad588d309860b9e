"""Losses by name: each a short function of (`LazyLogits`, labels) with one number a row, and a config dataclass."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

_REGISTRY: dict[str, tuple[Callable[..., Tensor], type]] = {}


def register(name: str, config: type) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register `function(logits, labels, config, **call_options) -> rows` under a name; `config` is a dataclass."""

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"a loss named {name!r} is registered already")
        _REGISTRY[name] = (function, config)
        return function

    return decorate


def list_losses() -> list[str]:
    """The names that `xhead.patch(model, loss=...)` knows, sorted."""
    return sorted(_REGISTRY)


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss of the registry with its options: `loss(logits, labels, **call_options) -> rows (n,)`."""

    name: str
    config: Any

    def __call__(self, logits: Any, labels: Tensor, **call_options: Any) -> Tensor:
        return _REGISTRY[self.name][0](logits, labels, self.config, **call_options)


@dataclass(frozen=True)
class UserLoss:
    """A user's own `loss(logits, labels) -> rows (n,)`."""

    function: Callable[[Any, Tensor], Tensor]

    def __call__(self, logits: Any, labels: Tensor, **call_options: Any) -> Tensor:
        if call_options:
            raise ValueError(
                f"cross-entropy was called with {', '.join(call_options)}, which the loss "
                f"{getattr(self.function, '__name__', self.function)!r} does not take; call it without, or patch with "
                'loss="cce"'
            )
        return self.function(logits, labels)


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


from xhead.losses import alignment, cross_entropy, distillation, margins, pairs  # noqa: E402, F401  register themselves
