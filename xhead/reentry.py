"""Modules that are called twice: for something lazy, and again for what is computed of it.

Hooks that gather the weight fire around the second call as around any. FSDP2 can make one group of several modules,
`fully_shard([norm, head])`, as accelerate does: its hooks count that each is called once. There they fire around the
call that computes, the first one, and around no other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xhead.calls import Call, parameter_form, with_gradient, wrappers_of
from xhead.data_parallel import show
from xhead.lazy import LazyLogits
from xhead.standin import Record


class Reentrant(nn.Module):
    """A module whose `forward(input)` may be lazy and whose `forward(input, consume=function)` computes."""

    def is_lazy(self) -> bool:
        """Whether a call now would be lazy."""
        raise NotImplementedError

    def __call__(self, *args: Any, **named: Any) -> Any:
        if "consume" not in named and _waiting_group(self) is not None and self.is_lazy():
            self.unshard()  # type: ignore[operator]
            return self.forward(*args, **named)
        return super().__call__(*args, **named)

    def lazy(self, kind: type[LazyLogits], hidden: Tensor, record: Record) -> LazyLogits:
        """The logits of a call with these hidden states, not computed yet. hidden: as in `Term`"""
        if not torch.compiler.is_compiling():
            return self._lazy(kind, hidden, record)
        if getattr(self, "_is_fsdp_managed_module", False):
            return self._lazy_out_of_graph(kind, hidden, record)
        return kind.deferred(hidden, self, record)  # type: ignore[arg-type]

    def _lazy(self, kind: type[LazyLogits], hidden: Tensor, record: Record) -> LazyLogits:
        logits = kind.deferred(hidden, Call(self, parameter_form(self), wrappers_of(self)), record)
        show(logits, self.parameters())
        return logits

    @torch.compiler.disable(reason="FSDP gathers parameters outside of the graph, and the logits have to tell it when")
    def _lazy_out_of_graph(self, kind: type[LazyLogits], hidden: Tensor, record: Record) -> LazyLogits:
        return self._lazy(kind, hidden, record)

    def consume(self, hidden: Tensor, function: Callable[..., Any]) -> Any:
        """`function` of the hidden states and the module's own, inside this module's call."""
        group = _waiting_group(self)
        if group is None or self in group:
            return self(hidden, consume=function)
        self.unshard()  # type: ignore[operator]
        found = self.forward(hidden, consume=function)
        for each in with_gradient(found):
            each.register_hook(self._gather)
        return found

    def _gather(self, gradient: Tensor) -> None:
        self.unshard()  # type: ignore[operator]


def _waiting_group(module: nn.Module) -> set[nn.Module] | None:
    """Those of the module's FSDP2 group that have not been called in this forward; None where it shares no group."""
    if torch.compiler.is_compiling() or not hasattr(module, "_get_fsdp_state"):
        return None
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    return state._modules_to_run_forward if len(state._modules) > 1 else None
