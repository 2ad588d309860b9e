"""Modules that are called twice: for something lazy, and again for what is computed of it.

Hooks that gather the weight fire around the second call as around any. FSDP2 can make one group of several modules,
`fully_shard([norm, head])`, as accelerate does: its hooks count that each is called once. There they fire around the
call that computes, the first one, and around no other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xhead.lazy import LazyLogits


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

    def consume(self, hidden: Tensor, function: Callable[..., Any]) -> Any:
        """`function` of the hidden states and the module's own, inside this module's call."""
        group = _waiting_group(self)
        if group is None or self in group:
            return self(hidden, consume=function)
        self.unshard()  # type: ignore[operator]
        found = self.forward(hidden, consume=function)
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(self._gather)
        return found

    def _gather(self, gradient: Tensor) -> None:
        self.unshard()  # type: ignore[operator]


def gather_before_backward(module: nn.Module, output: Any) -> None:
    """Have FSDP2 see the hidden states behind lazy logits that leave a module: it looks for tensors in the output.

    Without any, the gradients of parameters in the module's own group would not be reduced, and nothing would say so.

    Raises RuntimeError where only the head is trained, whose gradient passes no hidden states.
    """
    if not hasattr(module, "_get_fsdp_state") or not isinstance(output, Mapping):
        return
    for logits in (each for each in output.values() if isinstance(each, LazyLogits) and each.requires_grad):
        for hidden in (term.hidden for term in logits._terms):
            if not hidden.requires_grad:
                raise RuntimeError(
                    f"{type(module).__name__} is sharded by FSDP2 and nothing below its head is trained: give the "
                    "model its labels, so that the loss is computed inside of it"
                )
            hidden.register_hook(module._get_fsdp_state()._pre_backward)  # type: ignore[operator]


def _waiting_group(module: nn.Module) -> set[nn.Module] | None:
    """Those of the module's FSDP2 group that have not been called in this forward; None where it shares no group."""
    if torch.compiler.is_compiling() or not hasattr(module, "_get_fsdp_state"):
        return None
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    return state._modules_to_run_forward if len(state._modules) > 1 else None
