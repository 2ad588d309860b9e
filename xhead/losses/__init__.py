"""Losses by name: each a short function of (`LazyLogits`, labels) with one number a row, and a config dataclass."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from xhead import engines
from xhead.losses.composition import SumLoss, check_call_options, parse_sum
from xhead.losses.config import check_lazy


class Entry(NamedTuple):
    """A loss of the registry, and what the table of losses says of it."""

    function: Callable[..., Tensor]
    config: type
    call_options: frozenset[str]  # options of `F.cross_entropy` that the function takes
    ordered: bool
    formula: str
    statistics: tuple[str, ...]
    source: str


_REGISTRY: dict[str, Entry] = {}


def register(
    name: str,
    config: type,
    *,
    formula: str = "",
    statistics: tuple[str, ...] = (),
    source: str = "",
    ordered: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register `function(logits, labels, config, **call_options) -> rows` under a name; `config` is a dataclass.

    formula, statistics, source: the loss in a line, the names of the row statistics that it asks for, and its paper.
    The call options are the function's keyword-only arguments. Rows that are ignored may have been taken out; where
    `logits.row_mask` is not None every row is there, in its order, and it says which count. That is so on GPUs, in
    compiled graphs, with shared classes, and everywhere for `ordered`. Statistics of the others are 0, and what the
    function returns for them is left out: it matters to what looks across rows.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _REGISTRY:
            raise ValueError(f"a loss named {name!r} is registered already")
        parameters = inspect.signature(function).parameters.values()
        call_options = frozenset(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)
        _REGISTRY[name] = Entry(function, config, call_options, ordered, formula, statistics, source)
        return function

    return decorate


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

    def __post_init__(self) -> None:
        engines.check_name(getattr(self.config, "engine", "auto"))

    @property
    def ordered(self) -> bool:
        return _REGISTRY[self.name].ordered

    @property
    def takes_logits(self) -> bool:
        """Whether it is made of a few logits, not of statistics."""
        return not _REGISTRY[self.name].statistics

    @property
    def is_cross_entropy(self) -> bool:
        """Whether it is what `F.cross_entropy` of the logits without options is, up to the gradient's filter."""
        config = self.config
        return self.name == "cce" and config.label_smoothing == config.lse_penalty == 0

    @property
    def call_options(self) -> frozenset[str]:
        return _REGISTRY[self.name].call_options

    def __call__(self, logits: Any, labels: Tensor, **call_options: Any) -> Tensor:
        check_lazy(logits)
        check_call_options(self.name, self.call_options, call_options)
        return _REGISTRY[self.name].function(logits, labels, self.config, **call_options)


@dataclass(frozen=True)
class UserLoss:
    """A user's own `loss(logits, labels) -> rows (n,)`."""

    function: Callable[[Any, Tensor], Tensor]
    ordered = False

    def __call__(self, logits: Any, labels: Tensor, **call_options: Any) -> Tensor:
        check_call_options(getattr(self.function, "__name__", self.function), frozenset(), call_options)
        return self.function(logits, labels)


def get_loss(loss: str | Callable[[Any, Tensor], Tensor], **options: Any) -> RegisteredLoss | SumLoss | UserLoss:
    """The loss of that name with those options, a sum of such (`"cce+0.3*ntl_was"`), or the callable itself.

    In a sum, an option goes to every term that has it, and numbers before a star are factors.

    Raises ValueError for an unknown name, an option that no term has, a term that cannot be read, or options given to a
    callable, and what a loss's config raises for a value that it does not allow.
    """
    if callable(loss):
        if options:
            raise ValueError(
                f"options {', '.join(options)} go with a loss named by a string; bind them to your function with "
                "functools.partial"
            )
        return UserLoss(loss)
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a callable, got {loss!r}; names are {_known_losses()}")
    known = list_options(loss)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)} for loss {loss!r}; known are {', '.join(known)}")
    terms = parse_sum(loss)
    losses = [
        RegisteredLoss(
            name, _REGISTRY[name].config(**{key: value for key, value in options.items() if key in _options_of(name)})
        )
        for _, name in terms
    ]
    if len(terms) == 1 and terms[0][0] == 1:
        return losses[0]
    return SumLoss(tuple((factor, each) for (factor, _), each in zip(terms, losses, strict=True)))


def list_options(loss: str) -> list[str]:
    """The options of a loss named by a string, or of all terms of a sum. Raises ValueError as `get_loss` does."""
    terms = parse_sum(loss)
    for _, name in terms:
        if name not in _REGISTRY:
            within = "" if name == loss else f" in {loss!r}"
            raise ValueError(f"unknown loss {name!r}{within}; known are {_known_losses()}, or give a callable")
    return list(dict.fromkeys(option for _, name in terms for option in _options_of(name)))


def _options_of(name: str) -> list[str]:
    return [field.name for field in fields(_REGISTRY[name].config) if field.init]


def _known_losses() -> str:
    return ", ".join(list_losses())


from xhead.losses import (  # noqa: E402  register themselves
    adaptive_margins,  # noqa: F401
    alignment,  # noqa: F401
    cross_entropy,  # noqa: F401
    distillation,  # noqa: F401
    ldr,  # noqa: F401
    mann_whitney,  # noqa: F401
    margins,  # noqa: F401
    moments,  # noqa: F401
    multilabel,  # noqa: F401
    multilabel_softmax,  # noqa: F401
    number_level,  # noqa: F401
    number_tokens,  # noqa: F401
    pairs,  # noqa: F401
    probability,  # noqa: F401
    robust,  # noqa: F401
    soft_topk,  # noqa: F401
    sphereface2,  # noqa: F401
    spherical,  # noqa: F401
    stablemax,  # noqa: F401
)
