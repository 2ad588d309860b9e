"""Pointwise steps recorded on lazy logits: a short program, folded to `(scale, softcap, bias)` where it has that form.

A step is a pair `(name, argument)`:

| name | does |
|---|---|
| `mul`, `div`, `add` | by a number, a tensor of one element, or a tensor (V,) of one number a class |
| `tanh` | `tanh(o)` |
| `cast` | to a dtype; a cast to float64 also makes the statistics float64 |
| `apply` | any other function of the logits that keeps their shape: `argument(o)` |
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = tuple[str, Any]
Steps = tuple[Step, ...]


class Canonical(NamedTuple):
    """`o = rest(cap(scale * (hidden @ weight.T + bias)))`; `rest` is empty where the steps have the canonical form."""

    hidden: Tensor  # (..., D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None
    rest: Steps


def replay(steps: Steps, logits: Tensor) -> Tensor:
    """The steps, as they were asked for, on real logits (..., V)."""
    for name, argument in steps:
        if name == "mul":
            logits = logits * argument
        elif name == "div":
            logits = logits / argument
        elif name == "add":
            logits = logits + argument
        elif name == "tanh":
            logits = torch.tanh(logits)
        elif name == "cast":
            logits = logits.to(argument)
        else:
            logits = argument(logits)
    return logits


def describe(steps: Steps) -> str:
    """The steps in words, for messages: `div 30.0, tanh, mul 30.0`."""
    words = []
    for name, argument in steps:
        if isinstance(argument, Tensor):
            words.append(f"{name} a tensor {tuple(argument.shape)}")
        elif name == "apply":
            words.append(getattr(argument, "label", "apply"))
        else:
            words.append(name if argument is None else f"{name} {argument}")
    return ", ".join(words)


def of_classes(steps: Steps, classes: slice | Tensor) -> Steps:
    """The same steps for some of the classes alone, given as a slice or as indices (J,)."""
    return tuple(
        (name, argument[classes]) if isinstance(argument, Tensor) and argument.ndim == 1 else (name, argument)
        for name, argument in steps
    )


def linear_factor(steps: Steps) -> float | None:
    """The number that the steps multiply the logits by, or None where they do anything else."""
    factor = 1.0
    for name, argument in steps:
        if isinstance(argument, Tensor):
            return None
        if name == "mul":
            factor *= argument
        elif name == "div":
            factor /= argument
        elif name != "cast" or argument == torch.float64:
            return None
    return factor


def fold(
    steps: Steps,
    hidden: Tensor,  # (..., D)
    bias: Tensor | None,  # (V,)
    classes: int,
) -> Canonical:
    """Fold as many steps as have the form `cap(scale * (hidden @ weight.T + bias))`; what is left over is `rest`.

    Multiplications after a tanh set the softcap: `c * tanh(x) = cap(c * x)` with `cap(y) = c * tanh(y / c)`. Numerators
    and denominators are kept apart, so that `/ 30, tanh, * 30` folds to a scale of exactly 1.
    """
    over, under = 1.0, 1.0
    cap_over, cap_under = 1.0, 1.0
    capped = False
    for position, (name, argument) in enumerate(steps):
        is_tensor = isinstance(argument, Tensor)
        if name == "cast":
            continue
        if name == "tanh" and not capped:
            capped = True
        elif (
            name in ("mul", "div")
            and not is_tensor
            and (argument != 0 or not capped)
            and (name, argument) != ("div", 0)
        ):
            if name == "mul":
                over, cap_over = over * argument, cap_over * (abs(argument) if capped else 1.0)
            else:
                under, cap_under = under * argument, cap_under * (abs(argument) if capped else 1.0)
        elif name in ("mul", "div") and is_tensor and argument.ndim == 0 and not capped:
            # A learnable temperature: its gradient comes back through the hidden states (and the bias).
            factor = argument if name == "mul" else 1 / argument
            hidden = hidden * factor.to(hidden.dtype)
            bias = None if bias is None else bias * factor
        elif name == "add" and not capped and over != 0:
            extra: Any = argument * (under / over)
            if not is_tensor or argument.ndim == 0:
                extra = hidden.new_zeros(classes) + extra
            bias = extra if bias is None else bias + extra
        else:
            return _canonical(hidden, bias, over / under, capped, cap_over / cap_under, steps[position:])
    return _canonical(hidden, bias, over / under, capped, cap_over / cap_under, ())


def _canonical(
    hidden: Tensor, bias: Tensor | None, scale: float, capped: bool, softcap: float, rest: Steps
) -> Canonical:
    return Canonical(hidden, bias, scale, softcap if capped else None, rest)


def class_argument(value: Any, classes: int, ndim: int) -> Any:
    """`value` as the argument of a step (a number, a tensor () or a tensor (V,)), or None where it is none of these."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Tensor) or value.is_complex() or value.ndim > ndim:
        return None
    if value.numel() == 1:
        # More dimensions than the logits would add dimensions to the result; these are refused above.
        return value.reshape(())
    if value.shape[-1] == classes and value.numel() == classes:
        return value.reshape(classes)
    return None


def pointwise(function: Callable[..., Tensor], label: str, *args: Any, **kwargs: Any) -> Step:
    """The step that applies `function(logits, *args, **kwargs)`."""

    def apply(logits: Tensor) -> Tensor:
        return function(logits, *args, **kwargs)

    apply.label = label  # type: ignore[attr-defined]
    return ("apply", apply)
