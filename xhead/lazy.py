"""`LazyLogits`: logits that are not computed yet.

A model's own code goes on as if it held logits: it slices rows, scales, caps, adds biases, casts, reshapes, and calls
`F.cross_entropy`. The first kind is written down, the last is answered without the logits. Whatever is not understood
builds the logits after all: slower, never wrong, and said once in a `MaterializedWarning`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead import pointwise, replay
from xhead.pointwise import Steps
from xhead.recording import Recording
from xhead.shared_weight import rows_of
from xhead.standin import Record
from xhead.statistics import Statistics, check_range, row_statistics


class Projection(Protocol):
    """Where a weight and a bias come from. The weight is only ever touched inside `consume`."""

    out_features: int

    def consume(self, hidden: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        """`function(hidden, weight, bias)`, run where the weight can be read."""
        ...

    def trains(self) -> bool: ...


class Factors:
    """A projection whose weight and bias are at hand.

    joined: it stands for a sum of projections, `[h1, h2] [W1, W2]'`, whose rows do not have that sum's norms.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, joined: bool = False):
        self.weight, self.bias, self.joined = weight, bias, joined
        self.out_features = weight.shape[0]

    def consume(self, hidden: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        return function(hidden, self.weight, self.bias)

    def trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


class Term(NamedTuple):
    """One projection of a sum of projections: `factor * (hidden @ weight.T + bias)`."""

    hidden: Tensor  # (..., D)
    projection: Any
    factor: float


class LazyLogits(Recording):
    """Logits `o = cap(scale * (hidden @ weight.T + bias))`, `cap(x) = softcap * tanh(x / softcap)`, not computed yet.

    Args:
        hidden: (..., D), floating.
        weight: (V, D), of the dtype and device of `hidden` (under autocast: of any floating dtype).
        bias: (V,) or None.
        softcap: a positive number, or None for no cap.
        scale: a number.

    It has the shape (..., V) and answers the questions a tensor answers without its values. Products, sums and casts,
    `tanh`, reshapes that keep the last dimension, and slices give another `LazyLogits`. `F.cross_entropy`,
    `log_softmax`, `logsumexp`, `gather` of one class a row and `argmax` are answered without building the logits.

    Raises TypeError, RuntimeError or ValueError where the arguments do not fit together.
    """

    def __init__(
        self,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None = None,  # (V,)
        softcap: float | None = None,
        scale: float = 1.0,
    ):
        for name, tensor in (("hidden", hidden), ("weight", weight)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
            raise RuntimeError(
                f"hidden must be (..., D) and weight (V, D), got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise RuntimeError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
            raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")
        if not isinstance(scale, (int, float)):
            raise TypeError(
                f"scale must be a number, got {type(scale).__name__}; multiply the logits by a tensor instead"
            )
        steps: list[pointwise.Step] = [] if scale == 1 else [("mul", float(scale))]
        if softcap is not None:
            steps += [("div", float(softcap)), ("tanh", None), ("mul", float(softcap))]
        self._start((Term(hidden, Factors(weight, bias), 1.0),), Record(), tuple(steps))

    @classmethod
    def deferred(cls, hidden: Tensor, projection: Projection, record: Record) -> "LazyLogits":
        """Logits of a projection whose weight can only be read inside `projection.consume`."""
        logits = object.__new__(cls)
        logits._start((Term(hidden, projection, 1.0),), record, ())
        return logits

    def _start(self, terms: tuple[Term, ...], record: Record, steps: Steps) -> None:
        hidden = terms[0].hidden
        self._terms = terms
        self._steps = steps
        self._record = record
        self._columns = None
        self._detached = False
        self._with_grad = torch.is_grad_enabled()
        self._row_mask = None
        self._dense = None
        self._classes = terms[0].projection.out_features
        self.device = hidden.device
        self._compute_dtype = hidden.dtype
        kind = hidden.device.type
        # As nn.Linear: the dtype is settled where the projection is called, wherever the loss is taken later.
        if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
            self._compute_dtype = torch.get_autocast_dtype(kind)
        self._autocast = self._compute_dtype != hidden.dtype or torch.is_autocast_enabled(kind)
        self.dtype = self._compute_dtype

    def _like(self) -> "LazyLogits":
        other = object.__new__(LazyLogits)
        other._copy(self)
        return other

    def _copy(self, source: "LazyLogits") -> None:
        self._terms = source._terms
        self._steps = source._steps
        self._record = source._record
        self._columns = source._columns
        self._detached = source._detached
        self._with_grad = source._with_grad
        self._row_mask = source._row_mask
        self._dense = source._dense
        self._classes = source._classes
        self.device = source.device
        self.dtype = source.dtype
        self._compute_dtype = source._compute_dtype
        self._autocast = source._autocast

    # What it is.

    _terms: tuple[Term, ...]
    _columns: tuple[int, int] | None
    _row_mask: Tensor | None

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size((*self._terms[0].hidden.shape[:-1], self._classes))

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        if self._detached:
            return False
        return any(term.hidden.requires_grad or term.projection.trains() for term in self._terms)

    @property
    def hidden(self) -> Tensor:
        """(..., D): the hidden states, where the logits are `cap(scale * (hidden @ weight.T + bias))` at hand."""
        return self._at_hand().hidden

    @property
    def weight(self) -> Tensor:
        """(V, D): the classifier."""
        return self._factors().weight

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        return self._at_hand().bias

    @property
    def scale(self) -> float:
        return self._at_hand().scale

    @property
    def softcap(self) -> float | None:
        return self._at_hand().softcap

    def _factors(self) -> Factors:
        projection = self._terms[0].projection
        if len(self._terms) > 1 or self._columns is not None or not isinstance(projection, Factors):
            raise RuntimeError(
                "the weight of these logits belongs to a patched head and can only be read inside its call; "
                "ask for .statistics(...), which enters it"
            )
        return projection

    def _at_hand(self) -> pointwise.Canonical:
        factors = self._factors()
        canonical = pointwise.fold(self._steps, self._terms[0].hidden, factors.bias, self._classes)
        if canonical.rest:
            raise RuntimeError(
                "these logits are not cap(scale * (hidden @ weight.T + bias)): after it come "
                f"{pointwise.describe(canonical.rest)}; ask for .statistics(...), which replays them"
            )
        return canonical

    # What it computes.

    def statistics(self, *names: str, target: Tensor | None = None, **options: Any) -> Statistics:
        """Row statistics, each of shape `self.shape[:-1]`: see `xhead.statistics.row_statistics` for names and options.

        float32 (float64 for float64 logits), differentiable, with no N x V memory.
        """

        def compute(bound: LazyLogits) -> tuple[Tensor, ...]:
            found = bound._bound_statistics(names, target, options)
            return tuple(getattr(found, name) for name in names)

        values = self.evaluate(compute)
        return Statistics(**dict(zip(names, values, strict=True)))

    def class_logits(self, classes: Tensor) -> Tensor:  # (J,) int64
        """The logits of these classes alone, (..., J): J rows of the weight meet the hidden states, and no others.

        float32 (float64 for float64 logits), differentiable. Raises IndexError for a class outside `[0, V)`.
        """
        check_range("class", classes, self._classes)

        def compute(bound: LazyLogits) -> Tensor:
            hidden, factors = bound._terms[0].hidden, bound._factors()
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            index = classes.to(factors.weight.device)
            steps = tuple(step for step in pointwise.of_classes(bound._steps, index) if step[0] != "cast")
            with torch.autocast(hidden.device.type, enabled=False):
                weight = rows_of(factors.weight, index).to(dtype)
                bias = None if factors.bias is None else factors.bias[index].to(dtype)
                return pointwise.replay(steps, F.linear(hidden.to(dtype), weight, bias))

        return self.evaluate(compute).to(self.device)

    @property
    def row_mask(self) -> Tensor | None:
        """(...) bool: the rows that a loss counts, where the others were not taken out; None where all count."""
        return self._row_mask

    def evaluate(self, function: Callable[["LazyLogits"], Any]) -> Any:
        """`function(logits)` with the same logits, their weight at hand; its tensors leave through the head's hooks."""
        if self._detached:
            with torch.no_grad():
                return self._enter(self._terms, (), function)
        return self._enter(self._terms, (), function)

    def _enter(self, terms: tuple[Term, ...], gathered: tuple, function: Callable[["LazyLogits"], Any]) -> Any:
        if not terms:
            return function(self._bind(gathered))

        def receive(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return self._enter(terms[1:], (*gathered, (hidden, weight, bias, terms[0].factor)), function)

        return terms[0].projection.consume(terms[0].hidden, receive)

    def _bind(self, gathered: tuple) -> "LazyLogits":
        """The same logits, as one projection at hand: a sum of projections is that of `[h1, h2] [W1, W2]'`."""
        gathered = tuple(self._cast(*operands) for operands in gathered)
        if len(gathered) == 1:
            hidden, weight, bias, factor = gathered[0]
            steps = self._steps if factor == 1 else (("mul", factor), *self._steps)
        else:
            dtype = functools.reduce(torch.promote_types, [w.dtype for _, w, _, _ in gathered])
            hidden = torch.cat([(h * factor).to(dtype) for h, _, _, factor in gathered], -1)
            weight = torch.cat([w.to(dtype) for _, w, _, _ in gathered], 1)
            biases = [b * factor for _, _, b, factor in gathered if b is not None]
            bias = sum(biases[1:], biases[0]) if biases else None
            steps = self._steps
        if self._columns is not None:
            start, stop = self._columns
            weight, bias = weight[start:stop], None if bias is None else bias[start:stop]
        if any(step == ("cast", torch.float64) for step in self._steps):
            hidden, weight, bias = hidden.double(), weight.double(), None if bias is None else bias.double()
        bound = self._like()
        joined = len(gathered) > 1 or getattr(self._terms[0].projection, "joined", False)
        bound._terms = (Term(hidden, Factors(weight, bias, joined), 1.0),)
        bound._steps = steps
        bound._columns = None
        bound._compute_dtype = hidden.dtype
        bound._autocast = False
        return bound

    def _cast(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> tuple:
        if self._autocast:
            dtype = self._compute_dtype
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return hidden, weight, bias, factor

    def _bound_statistics(self, names: tuple[str, ...], target: Tensor | None, options: dict[str, Any]) -> Statistics:
        factors = self._factors()
        canonical = pointwise.fold(self._steps, self._terms[0].hidden, factors.bias, self._classes)
        if target is not None:
            target = target.to(canonical.hidden.device)
        options = {"row_mask": self._row_mask, **options, "target": target}
        # The operands carry the dtype they were cast to when the head was called; autocast must not cast them again.
        with torch.autocast(canonical.hidden.device.type, enabled=False):
            if canonical.rest:
                self._record.warn(
                    "replay",
                    f"these steps of the logits are replayed row block by row block, which is slower: "
                    f"{pointwise.describe(canonical.rest)}",
                )
                return replay.statistics(canonical, factors.weight, names, options)
            return row_statistics(
                canonical.hidden,
                factors.weight,
                names,
                bias=canonical.bias,
                scale=canonical.scale,
                softcap=canonical.softcap,
                **options,
            )

    def _build(self) -> Tensor:
        def build(bound: LazyLogits) -> Tensor:
            factors = bound._factors()
            with torch.autocast(bound.device.type, enabled=False):
                logits = F.linear(bound._terms[0].hidden, factors.weight, factors.bias)
                return pointwise.replay(bound._steps, logits)

        # Stock logits are made where the projection is called: in the gradient mode of that place, not of this one.
        with torch.set_grad_enabled(self._with_grad):
            dense = self.evaluate(build)
        return dense.to(self.device, self.dtype)
