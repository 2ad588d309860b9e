"""What DDP finds of lazy logits in a model's output.

Looking for unused parameters, it walks the graphs of the output's tensors, which it takes from lists, dicts and
dataclasses. It then sends these tensors through a node of its own, so that parameters behind an output that no loss
uses are told, by a gradient that is none, that nothing will come. The first step of a static graph needs that node too.

Lazy logits show it a tensor of no numbers, an anchor, whose graph is that of stock logits: the hidden states and the
parameters of the projection. What is computed of the logits hangs on the anchor that comes out of DDP's node.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from xhead.lazy import LazyLogits


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.inputs = 1 + len(parameters)
        return hidden.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * ctx.inputs


class _Joined(torch.autograd.Function):
    """The identity, of the first. The other is in the graph, and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.detach()  # the same memory, and no view: it may be written to

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def join(found: Any, anchor: Tensor) -> Any:
    """What was computed, a tensor or a tuple of tensors, with the anchor in the graph of each that has a gradient."""
    if isinstance(found, (tuple, list)):
        return type(found)([join(each, anchor) for each in found])
    return _Joined.apply(found, anchor) if isinstance(found, Tensor) and found.requires_grad else found


def show(logits: LazyLogits, parameters: Iterable[Tensor]) -> None:
    """Let DDP find the logits of one projection, with these parameters, in the output of the model that it runs now."""
    ddp: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not (ddp.find_unused_parameters or ddp.static_graph) or not torch.is_grad_enabled():
        return
    (term,) = logits._terms
    term.projection.anchor = _Anchor.apply(term.hidden, *(each for each in parameters if each.requires_grad))
    logits.__class__ = _shown(type(logits))


@functools.cache
def _shown(kind: type[LazyLogits]) -> type[LazyLogits]:
    """The kind of logits as a dataclass, whose fields DDP walks, and with tensors that it can replace."""

    def like(self: Any) -> Any:
        other = kind._like(self)
        other.__class__ = shown
        return other

    def flatten(logits: Any) -> tuple[list[Any], Any]:
        return [*(term.projection.anchor for term in logits._terms), logits._dense], logits

    def unflatten(values: Any, logits: Any) -> LazyLogits:
        *anchors, dense = values
        found = kind._like(logits)
        found._terms = tuple(
            term._replace(projection=dataclasses.replace(term.projection, anchor=anchor))
            for term, anchor in zip(logits._terms, anchors, strict=True)
        )
        found._dense = dense
        return found

    shown: Any = dataclasses.make_dataclass(
        kind.__name__,
        [("_terms", tuple), ("_dense", Any)],
        bases=(kind,),
        namespace={"_like": like},
        init=False,
        repr=False,
        eq=False,
    )
    pytree.register_pytree_node(shown, flatten, unflatten)
    return shown
