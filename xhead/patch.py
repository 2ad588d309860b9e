"""`patch`, `unpatch` and `status`: train a Hugging Face model without ever building its logits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

import xhead.answers  # noqa: F401  what lazy logits can answer is registered on import
from xhead import guard
from xhead.heads import list_heads
from xhead.lazy import LazyLogits
from xhead.losses import get_loss
from xhead.projection import (
    HeadPatch,
    claim,
    cut_layers,
    describe_patch,
    owner_and_head,
    projections,
    release,
)
from xhead.replacement import has_replaced_head, replace_head, restore_head
from xhead.standin import Record

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    loss: str | Callable[[LazyLogits, Tensor], Tensor] = "cce",
    *,
    head: str = "linear",
    lazy_eval: bool = False,
    **options: Any,
) -> Model:
    """Let the model's loss be computed without its logits; the model's own code stays as it is.

    The output projection (`model.get_output_embeddings()`) returns `LazyLogits` wherever gradients are enabled. The
    model slices, scales and caps them as it always does, and its call of `F.cross_entropy` is answered with `loss`.
    Evaluation and `generate()`, without gradients, get real logits, bit for bit, so that an evaluation's loss is
    cross-entropy whatever `loss` is. Nothing is added to checkpoints.

    Args:
        model: a `transformers` model with a linear output projection, tied or not; or one that a PEFT adapter wraps.
        loss: a name of `xhead.list_losses()`, a sum of such with factors (`"cce+0.3*ntl_was"`), or
            `loss(logits, labels) -> rows` with `logits` a `LazyLogits` of shape (n, V), `labels` (n,) int64 and `rows`
            (n,), one number a row. Ignored rows, the reduction and `num_items_in_batch` stay with the model; where
            `logits.row_mask` is not None the ignored rows are still there, and it says which count. Inside a loss
            `F.cross_entropy(logits, labels, reduction="none")` is cross-entropy.
        head: a name of `xhead.list_heads()`; `"linear"` keeps the model's own projection. Any other takes its
            place, has a loss of its own, is saved with the model and loaded by `xhead.load`; `unpatch` undoes it.
        lazy_eval: lazy logits without gradients too, for evaluation that wants the patched loss alone, or `argmax` of
            the logits; the Trainer's `compute_metrics` and `preprocess_logits_for_metrics` cannot gather these.
        options: options of the loss (in a sum, each goes to every term that has it), or of the head.

    Returns:
        The model, patched in place. A second call with the same arguments changes nothing.

    Raises:
        ValueError: an unknown loss, head or option, a model without an output projection or one patched otherwise
            before, a projection whose forward has been replaced.
        TypeError: an output projection that is no plain `torch.nn.Linear` (an embedding, a quantised layer), a head
            without an option that it needs.

    A model that the error is raised for is left as it was.

    Gradient accumulation: the older classes (BERT, T5, BART and others that build their own `CrossEntropyLoss`) ignore
    the Trainer's `num_items_in_batch`, patched or not, and their gradients then come out multiplied by the accumulation
    steps. Set `model.accepts_loss_kwargs = False` before the Trainer is made.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if head not in list_heads():
        raise ValueError(f"unknown head {head!r}; known are {', '.join(list_heads())}")
    if head != "linear":
        if loss != "cce":
            raise ValueError(
                f"the head {head!r} has a loss of its own, so loss={loss!r} cannot go with it; leave it out"
            )
        replace_head(model, head, lazy_eval, options)
        return model
    function = get_loss(loss, **options)
    wanted = (head, loss, options, lazy_eval)
    owner, projection = owner_and_head(model)
    for layer in cut_layers(model):
        if layer.xhead_patch.asked() != wanted:
            raise ValueError(
                f"the model is already patched, with {describe_patch(*layer.xhead_patch.asked())}; got "
                f"{describe_patch(*wanted)}. Call xhead.unpatch(model) first"
            )
    linears = projections(projection)
    guard.check_forward(owner)
    found = [layer for layer in linears if hasattr(layer, "xhead_patch")]
    head_patch = found[0].xhead_patch if found else HeadPatch(loss, options, lazy_eval, Record(loss=function))
    claim(linears, head_patch)  # type: ignore[arg-type]
    if not found:
        guard.watch(owner, head_patch)  # type: ignore[arg-type]
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: the stock projection again, its own module and parameters, and no hooks.

    Raises ValueError for a model that is not patched, for one that was loaded with its head, and where an adapter wraps
    a head.
    """
    if has_replaced_head(model):
        restore_head(model)
    if not guard.unwatch(model):
        raise ValueError(f"{type(model).__name__} is not patched: there is nothing to undo")
    release(cut_layers(model))
    return model


@dataclass(frozen=True)
class Status:
    """What the patch of a model has done so far.

    `cut` counts losses (and other row statistics) that were computed without the logits, `materialized` the times that
    logits had to be built after all, and `operations` what asked for them, by name. Calls inside a compiled graph are
    not counted: `compiled` says that there are such. `loss` is None for a head with a loss of its own.
    """

    patched: bool
    loss: Any = None
    head: str = "linear"
    lazy_eval: bool = False
    cut: int = 0
    materialized: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    compiled: bool = False


def status(model: nn.Module) -> Status:
    """Whether `model` is patched, and how often its loss was cut."""
    patches = list({id(layer.xhead_patch): layer.xhead_patch for layer in cut_layers(model)}.values())
    if not patches:
        return Status(patched=False)
    operations: dict[str, int] = {}
    for record in (each.record for each in patches):
        for name, count in record.operations.items():
            operations[name] = operations.get(name, 0) + count
        if record.compiled_materialized is not None:
            operations.setdefault(record.compiled_materialized, 1)
    return Status(
        patched=True,
        loss=patches[0].loss,
        head=patches[0].head,
        lazy_eval=patches[0].lazy_eval,
        cut=sum(each.record.cut for each in patches),
        materialized=sum(
            each.record.materialized + (each.record.compiled_materialized is not None) for each in patches
        ),
        operations=operations,
        compiled=any(each.record.compiled for each in patches),
    )
