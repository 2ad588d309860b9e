"""`LazyLogits`: logits that are not computed yet.

A model's own code goes on as if it held logits: it slices rows, scales, caps, adds biases, casts, reshapes, and calls
`F.cross_entropy`. The first kind is written down, the last is answered without the logits. Whatever is not understood
builds the logits after all, which is slower and said once in a `MaterializedWarning`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead import pointwise, replay
from xhead.factors import Factors, Operands, Projection, Term, at_hand, join
from xhead.pointwise import Steps
from xhead.recording import Recording
from xhead.shared_weight import rows_of
from xhead.standin import Record
from xhead.statistics import Statistics, check_range, check_scale, check_softcap, row_statistics
from xhead.vocabulary import Vocabulary, own_rows


class LazyLogits(Recording):
    """Logits `o = cap(scale * (hidden @ weight.T + bias))`, `cap(x) = softcap * tanh(x / softcap)`, not computed yet.

    Args:
        hidden: (..., D), floating.
        weight: (V, D), of the dtype and device of `hidden` (under autocast: of any floating dtype).
        bias: (V,) or None.
        softcap: a positive number, or None for no cap.
        scale: a number.
        vocabulary: weight and bias are the rows of this process, of those that a group shares. A weight that is a
            DTensor split along its rows says so itself. See docs/parallel.md.

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
        vocabulary: Vocabulary | None = None,
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
        softcap, scale = check_softcap(softcap), check_scale(scale)
        steps: list[pointwise.Step] = [] if scale == 1 else [("mul", float(scale))]
        if softcap is not None:
            steps += [("div", float(softcap)), ("tanh", None), ("mul", float(softcap))]
        factors = Factors(*own_rows(weight, bias, vocabulary))
        if factors.vocabulary is not None:
            hidden = factors.vocabulary.enter(hidden)
        self._start((Term(hidden, factors, 1.0),), Record(), tuple(steps))

    @classmethod
    def deferred(cls, hidden: Tensor, projection: Projection, record: Record) -> "LazyLogits":
        """Logits of a projection whose weight can only be read inside `projection.consume`. hidden: as in `Term`"""
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
        self._inside_loss = False
        self._dense = None
        self._classes = terms[0].projection.out_features
        self._sharded = getattr(terms[0].projection, "vocabulary", None) is not None
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
        self._inside_loss = source._inside_loss
        self._dense = source._dense
        self._classes = source._classes
        self._sharded = source._sharded
        self.device = source.device
        self.dtype = source.dtype
        self._compute_dtype = source._compute_dtype
        self._autocast = source._autocast

    # What it is.

    _terms: tuple[Term, ...]
    _columns: tuple[int, int] | None
    _row_mask: Tensor | None
    _gathered: "LazyLogits | None" = None

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
        canonical, vocabulary = self._at_hand(), self._factors().vocabulary
        return canonical.hidden if vocabulary is None else vocabulary.leave(canonical.hidden)

    @property
    def weight(self) -> Tensor:
        """(V, D): the classifier. Where processes share its rows, they are gathered."""
        return self.whole()._factors().weight

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        return self.whole()._at_hand().bias

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

    def whole(self) -> "LazyLogits":
        """The same logits with all rows of the weight at hand, for what is no row statistic.

        Where processes share the rows, these are gathered, V x D numbers, and each process does the whole work.
        """
        factors = self._factors()
        if factors.vocabulary is None:
            return self
        if self._gathered is None:
            hidden, weight, bias = factors.whole(self._terms[0].hidden, self._record)
            self._gathered = self._like()
            self._gathered._terms = (Term(hidden, Factors(weight, bias, joined=factors.joined), 1.0),)
            self._gathered._sharded = False
        return self._gathered

    def _own_steps(self) -> Steps:
        """The steps, for the classes of this process."""
        vocabulary = self._factors().vocabulary
        if vocabulary is None:
            return self._steps
        # A learned number has a part of its gradient in each process, as the hidden states have.
        entered = ((n, vocabulary.enter(a) if isinstance(a, Tensor) and a.requires_grad else a) for n, a in self._steps)
        return pointwise.of_classes(tuple(entered), vocabulary.own)

    def _canonical(self) -> pointwise.Canonical:
        factors = self._factors()
        return pointwise.fold(self._own_steps(), self._terms[0].hidden, factors.bias, factors.weight.shape[0])

    def _at_hand(self) -> pointwise.Canonical:
        canonical = self._canonical()
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
            index, vocabulary = classes.to(factors.weight.device), factors.vocabulary
            held = index
            if vocabulary is not None:
                held = vocabulary.holds(index)
                index = index[held] - vocabulary.start
            steps = tuple(step for step in pointwise.of_classes(bound._own_steps(), index) if step[0] != "cast")
            with torch.autocast(hidden.device.type, enabled=False):
                weight = rows_of(factors.weight, index).to(dtype)
                bias = None if factors.bias is None else factors.bias[index].to(dtype)
                found = pointwise.replay(steps, F.linear(hidden.to(dtype), weight, bias))
                if vocabulary is None:
                    return found
                # Every class is held by one process, and 0 in the others.
                everywhere = found.new_zeros(*found.shape[:-1], held.shape[0])
                return vocabulary.sum(everywhere.index_copy(-1, held.nonzero().squeeze(1), found))

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
            return self._enter(terms[1:], (*gathered, (hidden, weight, bias)), function)

        return terms[0].projection.consume(terms[0].hidden, receive)

    def _bind(self, gathered: tuple[Operands, ...]) -> "LazyLogits":
        """The same logits, with the weight at hand."""
        parts = [
            self._cast(hidden, at_hand(term.projection, weight, bias))
            for term, (hidden, weight, bias) in zip(self._terms, gathered, strict=True)
        ]
        factor = self._terms[0].factor
        if len(parts) == 1:
            hidden, factors = parts[0]
        else:
            scaled = [(term.factor, *part) for term, part in zip(self._terms, parts, strict=True)]
            hidden, factors = join(scaled, self._record)
            factor = 1
        if self._columns is not None:
            factors = factors.narrow(*self._columns)
        if any(step == ("cast", torch.float64) for step in self._steps):
            hidden, factors = hidden.double(), factors.to(torch.float64)
        bound = self._like()
        bound._terms = (Term(hidden, factors, 1.0),)
        bound._steps = self._steps if factor == 1 else (("mul", factor), *self._steps)
        bound._columns = None
        bound._sharded = factors.vocabulary is not None
        bound._compute_dtype = hidden.dtype
        bound._autocast = False
        return bound

    def _cast(self, hidden: Tensor, factors: Factors) -> tuple[Tensor, Factors]:
        if not self._autocast:
            return hidden, factors
        return hidden.to(self._compute_dtype), factors.to(self._compute_dtype)

    def _bound_statistics(self, names: tuple[str, ...], target: Tensor | None, options: dict[str, Any]) -> Statistics:
        factors, canonical = self._factors(), self._canonical()
        if canonical.rest and factors.vocabulary is not None:
            # What is applied to the logits may look at several classes.
            return self.whole()._bound_statistics(names, target, options)
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
                vocabulary=factors.vocabulary,
                **options,
            )

    def _build(self) -> Tensor:
        def build(bound: LazyLogits) -> Tensor:
            bound = bound.whole()
            factors = bound._factors()
            with torch.autocast(bound.device.type, enabled=False):
                logits = F.linear(bound._terms[0].hidden, factors.weight, factors.bias)
                return pointwise.replay(bound._steps, logits)

        # Stock logits are made where the projection is called: in the gradient mode of that place, not of this one.
        with torch.set_grad_enabled(self._with_grad):
            dense = self.evaluate(build)
        return dense.to(self.device, self.dtype)
