"""Put a head of xhead in the place of a model's output projection, take it out again, and load a model saved with one.

The head is untied from the input embeddings, which stay. What is tied besides stays tied, and the config's
`tie_word_embeddings` is left alone: classes such as T5 read other things from it. The head's name and options go into
`config.xhead_head`, its parameters into the checkpoint like any others.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from torch.distributed.tensor import DTensor

from xhead import guard
from xhead.heads import list_heads, make_head, read_options
from xhead.heads.base import Head, HeadLoss
from xhead.projection import HeadPatch, check_linear, claim, cut_layers, describe_patch, owner_and_head
from xhead.standin import Record

_KEY = "xhead_head"


@dataclass
class Replaced:
    """What was taken out of a model: kept on the model itself, so that copies of the head alone do not carry it."""

    projection: nn.Linear | None  # None: the model was loaded with its head
    ties: dict[str, tuple[dict[str, str], dict[str, str]]]  # by submodule: ties that were the projection's


def replace_head(model: nn.Module, name: str, lazy_eval: bool, options: dict[str, Any]) -> None:
    """Replace the output projection by the head of that name. Raises as `xhead.patch`, and changes nothing then."""
    owner, projection = owner_and_head(model)
    config, start_options = read_options(name, options)
    patched = cut_layers(model)
    if patched:
        asked = patched[0].xhead_patch.asked()
        if asked != (name, None, asdict(config), lazy_eval) or start_options:
            raise ValueError(
                f"the model is already patched, with {describe_patch(*asked)}; got "
                f"{describe_patch(name, None, options, lazy_eval)}. Call xhead.unpatch(model) first"
            )
        return
    if hasattr(projection, "base_layer") or hasattr(projection, "modules_to_save"):
        raise ValueError(
            f"an adapter wraps the output projection, a {type(projection).__name__}: replace the head first, with "
            f"xhead.patch(model, head={name!r}), and add the adapter after"
        )
    check_linear(projection)
    guard.check_forward(owner)
    linear: Any = projection
    _check_whole(linear, name)
    head = make_head(name, linear.in_features, linear.out_features, config)
    head.to(linear.weight.device, linear.weight.dtype)
    head.start_from(linear, **start_options)
    head.train(linear.training)
    _install(owner, linear, head, config, lazy_eval)
    owner.xhead_replaced.projection = linear


def _install(owner: Any, projection: nn.Module, head: Head, config: Any, lazy_eval: bool) -> None:
    patch = HeadPatch(None, asdict(config), lazy_eval, Record(loss=HeadLoss()), head=head.name)
    names = [name for name, module in owner.named_modules(remove_duplicate=False) if module is projection]
    ties = {name: found for name, module in owner.named_modules() if (found := _untie(name, module, names))}
    _put(owner, projection, head)
    if isinstance(getattr(owner, "config", None), transformers.PreTrainedConfig):
        setattr(owner.config, _KEY, {"name": head.name, **asdict(config)})
    owner.xhead_replaced = Replaced(None, ties)
    claim([head], patch)
    guard.watch(owner, patch)


def restore_head(model: nn.Module) -> None:
    """The reverse of `replace_head`: the projection's own module and parameters, tied as they were.

    Raises ValueError where the model was loaded with its head, or an adapter wraps it.
    """
    owner, head = owner_and_head(model)
    replaced = owner.__dict__["xhead_replaced"]
    if hasattr(head, "modules_to_save"):
        raise ValueError(
            f"a {type(head).__name__} wraps the head: unload the adapter (`model = model.unload()`) and call "
            "xhead.unpatch again"
        )
    if isinstance(head, Head) and replaced.projection is None:
        raise ValueError(
            f"the model was loaded with the head {head.name!r}, so there is no projection to put back; load the model "
            "that it was made from"
        )
    if isinstance(head, Head):
        parameter = next(head.parameters())
        _put(owner, head, replaced.projection.to(parameter.device, parameter.dtype))
        head.xhead_patch = None
    for name, ties in replaced.ties.items():
        _retie(owner.get_submodule(name), *ties)
    if hasattr(getattr(owner, "config", None), _KEY):
        delattr(owner.config, _KEY)
    del owner.xhead_replaced


def has_replaced_head(model: nn.Module) -> bool:
    return any("xhead_replaced" in vars(module) for module in model.modules())


def load(folder: str | Path, model_class: Any = None, *, lazy_eval: bool = False, **options: Any) -> Any:
    """Load a model that was saved by `save_pretrained` with a head of xhead, head and all; it comes patched.

    Args:
        folder: a folder, or a name on the Hub.
        model_class: the class of the model; by default the class of transformers that the config names.
        lazy_eval: as in `xhead.patch`.
        options: of `model_class.from_pretrained`.

    Raises:
        ValueError: the config has no head of xhead, or one of a name that is not known; the model class is no class of
            transformers and is not given.
    """
    model_config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(folder)
    found = dict(getattr(model_config, _KEY, None) or {})
    name = found.pop("name", None)
    if name not in list_heads():
        raise ValueError(
            f"the config of {str(folder)!r} has {_KEY}={getattr(model_config, _KEY, None)!r}; known heads are "
            f"{', '.join(list_heads())}. A model without one is loaded by its own class's from_pretrained"
        )
    if model_class is None:
        architectures = model_config.architectures or ["?"]
        model_class = getattr(transformers, architectures[0], None)
        if model_class is None:
            raise ValueError(f"transformers has no class {architectures[0]}; give it as model_class")
    head_config, _ = read_options(name, found)

    def make(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        model_class.__init__(self, config, *arguments, **named)
        owner, projection = owner_and_head(self)
        linear: Any = projection
        head = make_head(name, linear.in_features, linear.out_features, head_config)
        _install(owner, linear, head.to(linear.weight.device, linear.weight.dtype), head_config, lazy_eval)
        # The plan for tensor parallelism splits a linear projection: every process has the whole of a head.
        heads = {path for path, module in self.named_modules() if isinstance(module, Head)}
        self._tp_plan = {path: rule for path, rule in (self._tp_plan or {}).items() if path not in heads}

    def initialise(self: Any, module: nn.Module) -> None:
        # Some classes initialise the projection's weight from outside; the checkpoint holds all that the head needs.
        if not any(isinstance(child, Head) for child in (module, *module.children())):
            model_class._init_weights(self, module)

    # A subclass of the same name, so that transformers itself fills the head from the checkpoint, on any device.
    namespace = {"__init__": make, "_init_weights": initialise, "__module__": model_class.__module__}
    model = type(model_class.__name__, (model_class,), namespace).from_pretrained(
        folder, config=model_config, **options
    )
    model.__class__ = model_class
    return model


def _check_whole(linear: nn.Linear, name: str) -> None:
    """Raise ValueError where the weight that a head starts from is not there, as under DeepSpeed's ZeRO-3."""
    if isinstance(linear.weight, DTensor):
        raise ValueError(
            f"the head {name!r} starts from the output projection's whole weight, and processes hold it in parts: "
            "patch the whole model, before fully_shard; for tensor parallelism, save that and read it with "
            "xhead.load(folder, distributed_config=...)"
        )
    shape = (linear.out_features, linear.in_features)
    if linear.weight.shape != shape:
        raise ValueError(
            f"the head {name!r} starts from the output projection's weight, which must be {shape}, got "
            f"{tuple(linear.weight.shape)}: processes hold it in parts. Patch where it is gathered, with "
            "deepspeed.zero.GatheredParameters(list(model.get_output_embeddings().parameters())): xhead.patch(...)"
        )


def _put(owner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is."""
    for module in list(owner.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                setattr(module, name, new)


def _untie(prefix: str, module: Any, heads: list[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """Take the weights of the projection, found under these names, out of what transformers ties again and again."""
    path = f"{prefix}." if prefix else ""
    inside = tuple(f"{name.removeprefix(path)}." for name in heads if name.startswith(path))
    found = []
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(module, attribute, None)
        ties = ties if isinstance(ties, dict) and inside else {}
        found.append({key: value for key, value in ties.items() if f"{key}.".startswith(inside)})
        if found[-1]:
            setattr(module, attribute, {key: value for key, value in ties.items() if key not in found[-1]})
    return (found[0], found[1]) if any(found) else None


def _retie(module: Any, own: dict[str, str], of_all: dict[str, str]) -> None:
    if own:
        module._tied_weights_keys = {**module._tied_weights_keys, **own}
    if of_all:
        module.all_tied_weights_keys = {**module.all_tied_weights_keys, **of_all}
