"""The patched projection: `nn.Linear` whose call gives lazy logits, and where in a model such projections are.

The class of the existing module is swapped, and nothing else: parameters, names, hooks and checkpoints stay.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from xhead.heads.base import DATA_PARALLEL, Head, is_replica
from xhead.lazy import LazyLogits
from xhead.reentry import Reentrant
from xhead.standin import Record
from xhead.vocabulary import Vocabulary, of_dtensor


class HeadPatch:
    """What `xhead.patch` was asked for, shared by the projections of one model."""

    def __init__(self, loss: Any, options: dict[str, Any], lazy_eval: bool, record: Record, head: str = "linear"):
        self.loss, self.options, self.lazy_eval, self.record = loss, options, lazy_eval, record
        self.head = head
        self.entered = False

    def asked(self) -> tuple[str, Any, dict[str, Any], bool]:
        return self.head, self.loss, self.options, self.lazy_eval


def describe_patch(head: str, loss: Any, options: dict[str, Any], lazy_eval: bool) -> str:
    """What was asked for, as arguments."""
    first = {"loss": loss} if head == "linear" else {"head": head}
    return ", ".join(f"{name}={value!r}" for name, value in {**first, **options, "lazy_eval": lazy_eval}.items())


class CutLinear(Reentrant, nn.Linear):
    """A linear output projection that returns `LazyLogits` where a gradient may be wanted, real logits elsewhere.

    The loss runs inside this module's `__call__`, entered a second time with the function to apply: hooks that gather
    or load the weight (FSDP, ZeRO-3, offloading) fire around it as they do around any forward.
    """

    xhead_patch: HeadPatch

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # (..., D)
        consume: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None,
    ) -> Any:
        if consume is not None:
            return consume(input, self.weight, self.bias)
        patch = self.xhead_patch
        patch.entered = True
        if not self.is_lazy():
            return self._stock(input)
        vocabulary = self.vocabulary
        for reason, found in (
            ("DTensor weight", isinstance(self.weight, DTensor) and vocabulary is None),
            ("DataParallel", is_replica(self)),
        ):
            if found:
                patch.record.count_materialized(reason, _STOCK[reason])
                return self._stock(input)
        return self.lazy(LazyLogits, input if vocabulary is None else vocabulary.enter(input), patch.record)

    def _stock(self, input: Tensor) -> Tensor:
        forward = vars(self).get("xhead_stock_forward")  # what tensor parallelism has put around that of nn.Linear
        return super().forward(input) if forward is None else forward(input)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """How processes share the rows of the weight, seen inside this module's call."""
        if not isinstance(self.weight, DTensor) or torch.compiler.is_compiling() or _has_dtensor_hooks(self):
            return None
        return of_dtensor(self.weight)

    def is_lazy(self) -> bool:
        return torch.is_grad_enabled() or self.xhead_patch.lazy_eval

    def trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


_STOCK = {
    "DTensor weight": "the projection is split over devices in a way that cannot be cut, so its logits are built as "
    "ever; docs/parallel.md has the ways that can.",
    "DataParallel": DATA_PARALLEL,
}


def owner_and_head(model: nn.Module) -> tuple[Any, nn.Module]:
    """The outermost module of `model` with an output projection, and that projection.

    Raises ValueError where there is none.
    """
    for module in model.modules():
        if callable(getattr(type(module), "get_output_embeddings", None)):
            head = module.get_output_embeddings()  # type: ignore[operator]
            if head is not None:
                return module, head
    raise ValueError(
        f"{type(model).__name__} has no output projection: get_output_embeddings() gives None. xhead patches models "
        "that project hidden states onto a vocabulary, such as those of AutoModelForCausalLM"
    )


def projections(head: Any) -> list[Any]:
    """The layers whose outputs are the logits: the head itself, or those inside the adapter that wraps it.

    Raises TypeError or ValueError, naming the fix, for a head that cannot be patched. Changes nothing.
    """
    if isinstance(head, nn.Module) and hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        copies: Any = head.modules_to_save
        return [linear for module in (head.original_module, *copies.values()) for linear in projections(module)]
    if isinstance(head, nn.Module) and isinstance(getattr(head, "base_layer", None), nn.Module):
        # LoRA adds lora_B(lora_A(x)) to the output of the layer it wraps: with lora_B lazy too, the sum is one
        # projection. Any other adapter, and a lora_B that is no plain linear layer, gets real logits when it asks.
        lora_b = getattr(head, "lora_B", None)
        low_rank = lora_b.values() if isinstance(lora_b, nn.ModuleDict) else ()
        plain = [layer for layer in low_rank if type(layer) is nn.Linear or isinstance(layer, CutLinear)]
        return [*projections(head.base_layer), *plain]
    if not isinstance(head, Head):
        check_linear(head)
    return [head]


def check_linear(head: Any) -> None:
    """Raise TypeError or ValueError for an output projection that is no plain linear layer."""
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if type(head) is not nn.Linear and not isinstance(head, CutLinear):
        advice = "it has no linear projection of its own that could be left out"
        if isinstance(head, nn.Linear):
            advice = (
                "its forward may not be that of torch.nn.Linear. Patch before anything changes the layer's class "
                "(fully_shard, parametrizations); a quantised head can be kept in torch.nn.Linear with "
                'modules_to_not_convert=["lm_head"] or its like'
            )
        raise TypeError(f"the output projection is a {name}; xhead patches torch.nn.Linear, and {advice}")
    weight = head.weight
    # A plain tensor is what FSDP puts in the parameter's place while the model runs.
    plain = type(weight) in (nn.Parameter, Tensor) or isinstance(weight, DTensor)
    if not weight.is_floating_point() or not plain:
        raise TypeError(
            f"the output projection's weight is a {type(weight).__name__} of {weight.dtype}; xhead patches a plain "
            "floating point weight: leave the output projection out of the quantisation"
        )
    forward = head.__dict__.get("forward")
    known = "_old_forward" in head.__dict__ or _function(forward) in _OWN_FORWARDS or is_tensor_parallel(forward)
    if forward is not None and not known:
        raise ValueError(
            f"the output projection's forward has been replaced on the module itself, by {describe(forward)}; undo "
            "that, or patch the model before it is done"
        )


def claim(linears: list[Any], patch: HeadPatch) -> None:
    """Swap the class of each layer to `CutLinear`, and let all of them share one patch (adapters copy the head's).

    Raises TypeError where a head of the patch's name is wanted and another layer found.
    """
    for linear in linears:
        if (linear.name if isinstance(linear, Head) else "linear") != patch.head:
            raise TypeError(f"it is a {type(linear).__name__} now, where the head {patch.head!r} was")
        if not isinstance(linear, (CutLinear, Head)):
            linear.__class__ = CutLinear
            _rebind(linear, CutLinear.forward)
            if is_tensor_parallel(linear.__dict__.get("forward")):
                linear.__dict__["xhead_stock_forward"] = linear.__dict__.pop("forward")
        if vars(linear).get("xhead_patch") is not patch:
            linear.xhead_patch = patch


def release(linears: list[CutLinear]) -> None:
    """The reverse of `claim`."""
    for linear in linears:
        del linear.xhead_patch
        if type(linear) is CutLinear:
            linear.__class__ = nn.Linear  # type: ignore[assignment]
            _rebind(linear, nn.Linear.forward)
            if "xhead_stock_forward" in vars(linear):
                linear.__dict__["forward"] = linear.__dict__.pop("xhead_stock_forward")


def _rebind(linear: nn.Linear, forward: Callable[..., Any]) -> None:
    """accelerate keeps the forward that it wraps on the module, bound: bind the one of the new class instead."""
    for name in ("forward", "_old_forward"):
        if _function(linear.__dict__.get(name)) in _OWN_FORWARDS:
            linear.__dict__[name] = types.MethodType(forward, linear)


def is_tensor_parallel(forward: Any) -> bool:
    """Whether transformers has put this forward around that of a linear layer whose rows it has split over processes.

    It turns the hidden states into a DTensor, calls the layer's own forward, and gathers the logits.
    """
    function = _function(forward)
    if getattr(function, "__module__", None) not in _TENSOR_PARALLEL:
        return False
    around = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    style, inner = (around[name].cell_contents if name in around else None for name in ("self", "original_forward"))
    whole = isinstance(getattr(style, "output_layouts", None), Replicate)
    return type(style).__name__ == "ColwiseParallel" and whole and _function(inner) in _OWN_FORWARDS


_TENSOR_PARALLEL = ("transformers.distributed.tensor_parallel", "transformers.integrations.tensor_parallel")


def _has_dtensor_hooks(linear: nn.Module) -> bool:
    """Whether hooks of `torch.distributed.tensor.parallel` expect a DTensor of logits from the layer."""
    hooks = linear._forward_hooks.values()
    return any(getattr(hook, "__qualname__", "").startswith("distribute_module.") for hook in hooks)


def cut_layers(model: nn.Module) -> list[Any]:
    """The patched layers in `model`: `CutLinear`, or heads that took the projection's place."""
    return [
        module
        for module in model.modules()
        if isinstance(module, CutLinear) or (isinstance(module, Head) and module.xhead_patch is not None)
    ]


def _function(forward: Any) -> Any:
    return getattr(forward, "__func__", forward)


def describe(forward: Any) -> str:
    """The dotted name of a function or bound method."""
    function = _function(forward)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


_OWN_FORWARDS = (nn.Linear.forward, CutLinear.forward)
