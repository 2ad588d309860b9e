"""Watch that a patch is not lost: another head put in place, a forward replaced, a projection never called.

Hooks on the model and on its backbone check at each training forward. What can be mended is (a new `nn.Linear` head,
adapters added later); anything else raises, with the fix.
"""

import functools
import types
from typing import Any

import torch
from torch import nn

from xhead.projection import HeadPatch, claim, cut_layers, describe, projections

_FUSED_HEAD_ARGUMENT = "fused_lm_head"


class BeforeForward:
    """Forward pre-hook of the model and its backbone."""

    def __init__(self, owner: Any, patch: HeadPatch):
        self.owner, self.patch = owner, patch

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            if type(self.owner.get_output_embeddings()) is nn.Linear:
                self.mend()
            return
        if module is self.owner:
            self.patch.entered = self.patch.record.answered = False
        self.check()

    @torch.compiler.disable(reason="the output projection that xhead patched has been replaced since")
    def mend(self) -> None:
        """`check`, outside the graph; a full graph stops here, with the reason."""
        self.check()

    def check(self) -> None:
        check_forward(self.owner)
        try:
            claim(projections(self.owner.get_output_embeddings()), self.patch)
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"the xhead patch of {type(self.owner).__name__} is lost, its output projection has been replaced: "
                f"{error}. Call xhead.unpatch(model) to train with the new one as it is"
            ) from error


class AfterForward:
    """Forward hook of the model: with labels and gradients, the loss must be the patched one."""

    def __init__(self, owner: Any, patch: HeadPatch):
        self.owner, self.patch = owner, patch

    def __call__(self, module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if named.get("labels") is not None and not self.patch.entered:
            raise RuntimeError(
                f"{type(self.owner).__name__} computed a loss without calling its patched output projection, so the "
                "patch has no part in it: its forward, or whatever replaced it, reads the projection's weight itself. "
                "Undo what replaced it, or call xhead.unpatch(model)"
            )
        other = self.patch.record.other_loss()
        if named.get("labels") is not None and other is not None and not self.patch.record.answered:
            built = ", ".join(self.patch.record.operations) or "none"
            raise RuntimeError(
                f"{type(self.owner).__name__} computed its loss of logits that were built, so it is not {other}, which "
                f"it was patched with. Logits were built for: {built}. Take out what needs them (an adapter on the "
                "projection, a step between it and the loss), or call xhead.unpatch(model)"
            )


def watch(owner: Any, patch: HeadPatch) -> None:
    """Register the hooks."""
    before = BeforeForward(owner, patch)
    for module in (owner, *_backbones(owner)):
        module.register_forward_pre_hook(before)
    owner.register_forward_hook(AfterForward(owner, patch), with_kwargs=True)


def unwatch(model: nn.Module) -> bool:
    """Remove every hook that `watch` registered in `model`; whether there were any."""
    found = False
    for module in model.modules():
        for hooks, extra in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (BeforeForward, AfterForward))]:
                del hooks[key]
                extra.pop(key, None)
                found = True
    return found


def _backbones(owner: Any) -> list[nn.Module]:
    """What runs before the head. Adapters call the model's forward past its hooks, but not past the backbone's."""
    backbone = getattr(owner, "base_model", owner)
    if backbone is not owner:
        return [backbone]
    return [child for child in owner.children() if not cut_layers(child)]


def check_forward(owner: Any) -> None:
    """Raise RuntimeError where the model's forward was replaced on the instance by one that leaves the head out."""
    forward, own = owner.__dict__.get("forward"), type(owner).forward
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if function is own:
            return
        if _FUSED_HEAD_ARGUMENT in (getattr(function, "__kwdefaults__", None) or ()):
            raise RuntimeError(
                f"TRL has given {type(owner).__name__} a fused output head of its own, which leaves the patched one "
                "out: the xhead patch would have no effect. Use own_loss(SFTTrainer), with `from xhead.trainer import "
                "own_loss`, in the place of SFTTrainer; or call xhead.unpatch(model)"
            )
        inner = getattr(function, "__wrapped__", None)
        if inner is None and isinstance(function, functools.partial):
            inner = function.func
        if inner is None and isinstance(function, types.FunctionType):
            raise RuntimeError(
                f"the forward of {type(owner).__name__} has been replaced by {describe(function)}, which leaves the "
                "patched output projection out: the xhead patch would have no effect. Train with "
                "use_liger_kernel=False (or undo whatever replaced the forward), or call xhead.unpatch(model)"
            )
        forward = inner
