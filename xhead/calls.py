"""A lazy call of a module, which is computed where its logits are asked: inside the model's forward or after it.

After it, FSDP may have sharded the module's parameters again, and has looked in vain for tensors in the model's output,
whose gradients tell it to gather parameters and to reduce gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xhead.data_parallel import join

Form = tuple[Any, ...]
"""What a module's parameters look like, as far as sharding changes it."""


@dataclass(eq=False)
class Call:
    """The projection of lazy logits that a `Reentrant` gave: it enters that module again, wherever it is asked.

    module: the `Reentrant`.
    form: of its parameters, as they were in the lazy call.
    wrappers: the FSDP2 modules around the module in whose forward it was called, from the innermost on.
    anchor: (0,), what DDP has found in place of the logits; see `xhead.data_parallel`.
    """

    module: Any
    form: Form
    wrappers: tuple[Any, ...]
    anchor: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.module.out_features

    @property
    def vocabulary(self) -> Any:
        return getattr(self.module, "vocabulary", None)

    def trains(self) -> bool:
        return self.module.trains()

    def consume(self, hidden: Tensor, function: Callable[..., Any]) -> Any:
        """`function` of the hidden states and the module's own, inside the module's call.

        Raises RuntimeError where FSDP has sharded the module's parameters, and nothing here can gather them.
        """
        if torch.compiler.is_compiling():
            return self.module.consume(hidden, function)

        def checked(*operands: Any) -> Any:
            if parameter_form(self.module) != self.form:
                raise RuntimeError(_SHARDED)
            return function(*operands)

        left = [each for each in self.wrappers if not _in_forward(each)]
        with _gathered(self.module, left):
            found = self.module.consume(hidden, checked)
        for each in with_gradient(found):
            for wrapper in reversed(left):
                each.register_hook(wrapper._get_fsdp_state()._pre_backward)
        return found if self.anchor is None else join(found, self.anchor)


@contextmanager
def _gathered(module: nn.Module, left: list[Any]) -> Iterator[None]:
    """The module's parameters whole, where the innermost FSDP2 module around it has sharded them after its forward."""
    if not left or hasattr(module, "_get_fsdp_state"):
        yield
        return
    before = list(module.parameters())
    left[0].unshard()
    try:
        yield
    finally:
        if any(now is not then for now, then in zip(module.parameters(), before, strict=True)):
            left[0].reshard()


def wrappers_of(module: nn.Module) -> tuple[Any, ...]:
    """The FSDP2 modules around a module in whose forward it runs, from the innermost on."""
    if not getattr(module, "_is_fsdp_managed_module", False):
        return ()
    from torch.distributed._composable_state import _module_state_mapping

    # In the order of their making, which has to be bottom-up.
    sharded = [each for each in _module_state_mapping if hasattr(each, "_get_fsdp_state") and _in_forward(each)]
    return tuple(each for each in sharded if each is not module and any(inner is module for inner in each.modules()))


def _in_forward(wrapper: Any) -> bool:
    return wrapper._get_fsdp_state()._training_state.name == "FORWARD"


_SHARDED = (
    "the loss is computed outside of the model, where FSDP has sharded the weight of its output projection again: "
    "FSDP1 gathers it around its own forward alone. Give the model its labels, so that the loss is computed inside of "
    "it (with the Trainer: neither label_smoothing_factor nor compute_loss_func), or use FSDP2: fully_shard(model), "
    "accelerate's fsdp_version: 2"
)


def parameter_form(module: nn.Module) -> Form:
    """Of a module inside its call. Modules inside it have calls of their own, around which their parameters change.

    FSDP1 has one parameter for all, of which it puts views in the place of others while the model runs; what these are
    views of becomes smaller once that is over.
    """
    own = [(isinstance(each, DTensor), each.shape) for each in _tensors(module)]
    bases = [each._base for inner in module.modules() for each in _tensors(inner)]
    return (*own, *(None if base is None else base.shape for base in bases))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [each for each in (*module._parameters.values(), *vars(module).values()) if isinstance(each, Tensor)]


def with_gradient(found: Any) -> list[Tensor]:
    """The tensors among what was computed, one or several, that have a gradient."""
    values = found if isinstance(found, (tuple, list)) else (found,)
    return [each for each in values if isinstance(each, Tensor) and each.requires_grad]
