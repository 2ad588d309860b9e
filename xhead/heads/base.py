"""The base of heads that take the place of a model's output projection, and the lazy logits that they give.

Unlike a projection with another loss, such a head has parameters of its own, and a loss that only it can compute.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xhead.answers  # noqa: F401  what lazy logits can answer is inherited when a class is made
from xhead import pointwise
from xhead.calls import Call
from xhead.factors import Term
from xhead.lazy import LazyLogits
from xhead.reentry import Reentrant

DATA_PARALLEL = (
    "it gathers the outputs of each GPU, so they are built as ever. Start one process a GPU instead, with "
    "`accelerate launch` or `torchrun`."
)


def is_replica(module: nn.Module) -> bool:
    """Whether the module is one of the copies that `torch.nn.DataParallel` makes for a forward."""
    return vars(module).get("_is_replica", False)


class Head(Reentrant):
    """A head of V classes on hidden states of width D, in the place of `nn.Linear(D, V)`.

    A subclass is made by `cls(in_features, out_features, config)`, config being the dataclass that it is registered
    with, and defines `logits` and `loss_rows`. Everything that makes two heads different is in the config, the
    parameters and the persistent buffers, so that a checkpoint restores a head bit for bit.

    On its own a head gives its real logits. Patched into a model, it gives lazy ones wherever gradients are enabled,
    whose `F.cross_entropy` is answered with `loss_rows`.
    """

    name: ClassVar[str]
    xhead_patch: Any = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def logits(self, hidden: Tensor) -> Tensor:  # (..., D)
        """(..., V): unnormalised log-probabilities, in the dtype of `hidden`."""
        raise NotImplementedError

    def loss_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (n, D), (n,) int64
        """(n,): the loss of each row, differentiable, in float32 (float64 for float64 `hidden`).

        Labels are in [0, V) unless the model's own code lets others through; raise IndexError for these. Under
        autocast `hidden` comes in the autocast dtype, and autocast is off. Keyword-only arguments are the options of
        `F.cross_entropy` that the head takes, such as `label_smoothing`; any other is refused.
        """
        raise NotImplementedError

    def start_from(self, projection: nn.Linear) -> None:  # weight (V, D)
        """Set the parameters from the projection that the head replaces. Without an override they stay as made.

        Keyword-only arguments are options of `xhead.patch` for the start alone: they are not kept in the config.
        """

    def forward(
        self,
        hidden: Tensor,  # (..., D)
        consume: Callable[[Tensor, "Head"], Any] | None = None,
    ) -> Any:
        """(..., V) logits, real or lazy. The loss runs in here too: see `CutLinear`."""
        if consume is not None:
            return consume(hidden, self)
        patch = self.xhead_patch
        if patch is None:
            return self.logits(hidden)
        patch.entered = True
        if not self.is_lazy():
            return self.logits(hidden)
        if is_replica(self):
            patch.record.count_materialized("DataParallel", DATA_PARALLEL)
            return self.logits(hidden)
        return self.lazy(HeadLogits, hidden, patch.record)

    def is_lazy(self) -> bool:
        patch = self.xhead_patch
        return patch is not None and (torch.is_grad_enabled() or patch.lazy_eval)

    def trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "weight" not in self._parameters:
            return _NoWeight(self)
        return super().__getattr__(name)


class InnerLinear(nn.Linear):
    """A linear layer inside a head: in the dtype of its input, and read inside its own call alone.

    That is where hooks have gathered the weight: those of `fully_shard` on the layer itself, and of ZeRO-3.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # (..., D)
        consume: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None,
    ) -> Any:
        """(..., K), or `consume(input, weight, bias)`."""
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, weight, bias) if consume is None else consume(input, weight, bias)


class _NoWeight:
    """What code gets that asks for the weight of a projection that a head has replaced: its dtype and device alone."""

    def __init__(self, head: Head):
        self._head = head

    @property
    def dtype(self) -> torch.dtype:
        return next(self._head.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self._head.parameters()).device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the head {self._head.name!r} has no weight of one row a class, which was asked for its {name}. Call "
            "xhead.unpatch(model) before what resizes, ties or fuses the output projection"
        )


class HeadLogits(LazyLogits):
    """The logits of a `Head`, not computed yet.

    `F.cross_entropy` is answered by the head's own loss. Row statistics need a weight, which a head need not have, so
    any other question builds the logits.
    """

    def _ask(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        return NotImplemented if name in _OF_STATISTICS else super()._ask(name, args, kwargs)

    def _sum(self, other: Any) -> Any:
        return NotImplemented

    def _like(self) -> "HeadLogits":
        other = object.__new__(HeadLogits)
        other._copy(self)
        return other

    @property
    def head(self) -> Any:
        projection = self._terms[0].projection
        return projection.module if isinstance(projection, Call) else projection

    @property
    def hidden(self) -> Tensor:
        """(..., D)"""
        return self._terms[0].hidden

    def _factors(self) -> Any:
        raise RuntimeError(
            f"these logits are those of the head {self.head.name!r}, which has no weight of one row a class: neither "
            "row statistics nor single columns can be asked for. Ask for .materialize(), or use F.cross_entropy"
        )

    def evaluate(self, function: Callable[[Any], Any]) -> Any:
        def receive(hidden: Tensor, head: Head) -> Any:
            bound = self._like()
            dtype = self._compute_dtype if self._autocast else hidden.dtype
            if any(step == ("cast", torch.float64) for step in self._steps):
                dtype = torch.float64
            bound._terms = (Term(hidden.to(dtype), head, 1.0),)
            return function(bound)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detached):
            return self._terms[0].projection.consume(self.hidden, receive)

    def _build(self) -> Tensor:
        def build(bound: HeadLogits) -> Tensor:
            with torch.autocast(bound.device.type, enabled=False):
                logits = bound.head.logits(bound.hidden)
                if bound._columns is not None:
                    logits = logits[..., slice(*bound._columns)]
                return pointwise.replay(bound._steps, logits)

        with torch.set_grad_enabled(self._with_grad):
            dense = self.evaluate(build)
        return dense.to(self.device, self.dtype)


_OF_STATISTICS = frozenset({"log_softmax", "logsumexp", "argmax", "gather"})


class HeadLoss:
    """The loss of the head that the lazy logits come from, as a loss of the patch: `loss(logits, labels) -> rows`."""

    ordered = False
    is_cross_entropy = True  # that of the head's own logits

    def __call__(self, logits: HeadLogits, labels: Tensor, **call_options: Any) -> Tensor:
        head = logits.head
        parameters = inspect.signature(head.loss_rows).parameters.values()
        known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        unknown = [option for option in call_options if option not in known]
        if unknown:
            raise ValueError(
                f"cross-entropy was called with {', '.join(unknown)}, which the head {head.name!r} does not take"
                f"{'; it takes ' + ', '.join(known) if known else ''}. Call it without (the Trainer's is "
                "label_smoothing_factor), or keep the model's own head: xhead.patch(model)"
            )
        steps = tuple(step for step in logits._steps if step[0] != "cast" and not _adds_nothing(step))
        if logits._columns is not None or pointwise.linear_factor(steps) != 1:
            done = pointwise.describe(steps) if steps else f"columns {logits._columns}"
            raise ValueError(
                f"the model changes its logits before the loss ({done}), which the head {head.name!r} cannot take: its "
                "loss is of the logits as they leave it. Turn the change off in the model's config (such as "
                "final_logit_softcapping=None, logit_scale=1, logits_scaling=1), or keep the model's own head"
            )
        return head.loss_rows(logits.hidden, labels, **call_options)


def _adds_nothing(step: pointwise.Step) -> bool:
    """Whether a step adds a constant bias that is zero, as BART and its relatives do."""
    name, argument = step
    if name != "add" or not isinstance(argument, Tensor) or argument.requires_grad or torch.compiler.is_compiling():
        return False
    return not argument.any()
