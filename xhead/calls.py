"""A lazy call of a module, which is computed where its logits are asked: inside the model's forward or after it.

After it, FSDP may have sharded the module's parameters again, and has looked in vain for tensors in the model's output,
whose gradients tell it to gather them and to reduce theirs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xhead.data_parallel import join
from xhead.lazy import LazyLogits

Form = tuple[Any, ...]
"""What a module's parameters look like, as far as sharding changes it."""


@dataclass(eq=False)
class Call:
    """The projection of lazy logits that a `Reentrant` gave: it enters that module again, wherever it is asked.

    module: the `Reentrant`.
    form: of its parameters, as they were in the lazy call.
    anchor: (0,), what DDP has found in place of the logits; see `xhead.data_parallel`.
    wrappers: FSDP2 modules around the module that the logits have left, from the outermost on.
    """

    module: Any
    form: Form
    anchor: Tensor | None = None
    wrappers: tuple[Any, ...] = ()

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

        def checked(*operands: Any) -> Any:
            if parameter_form(self.module) != self.form:
                raise RuntimeError(_SHARDED)
            return function(*operands)

        with self._gathered():
            found = self.module.consume(hidden, checked)
        for each in with_gradient(found):
            for wrapper in self.wrappers:
                each.register_hook(wrapper._get_fsdp_state()._pre_backward)
        return found if self.anchor is None else join(found, self.anchor)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """The module's parameters whole, where an FSDP2 module around it has sharded them after its forward."""
        if not self.wrappers or hasattr(self.module, "_get_fsdp_state"):
            yield
            return
        holder, before = self.wrappers[-1], list(self.module.parameters())
        holder.unshard()
        try:
            yield
        finally:
            if any(now is not then for now, then in zip(self.module.parameters(), before, strict=True)):
                holder.reshard()

    def leave(self, owner: nn.Module) -> None:
        """The logits leave the forward of `owner`, around which FSDP gathers parameters."""
        if not getattr(self.module, "_is_fsdp_managed_module", False):
            return
        around, inner = [owner], owner
        for name in next(name for name, each in owner.named_modules() if each is self.module).split(".")[:-1]:
            inner = inner.get_submodule(name)
            around.append(inner)
        self.wrappers = tuple(each for each in around if hasattr(each, "_get_fsdp_state"))


_SHARDED = (
    "the loss is computed outside of the model, where FSDP has sharded the weight of its output projection again. Give "
    "the model its labels, so that the loss is computed inside of it (with the Trainer: neither label_smoothing_factor "
    "nor compute_loss_func); or use FSDP2 (accelerate: fsdp_version 2) with the projection in a group of its own, "
    "fully_shard(model.lm_head), or one that stays whole after its forward, reshard_after_forward=False"
)


def leave(owner: nn.Module, output: Any) -> None:
    """Tell the lazy logits in the output of `owner` that they leave it."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    for logits in values:
        for term in logits._terms if isinstance(logits, LazyLogits) else ():
            if isinstance(term.projection, Call):
                term.projection.leave(owner)


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
