"""`accumulate`: one gradient of the output projection for many micro-batches."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from xhead.engines.deferral import Pending, put_off
from xhead.exchange import Exchange
from xhead.projection import cut_layers


@contextmanager
def accumulate(
    head: nn.Module | Tensor, *, process_group: torch.distributed.ProcessGroup | None = None
) -> Iterator[None]:
    """Make the projection's weight gradient once, at the end of the block, for all backward passes inside it.

        with xhead.accumulate(model):
            for batch in micro_batches:
                model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    For losses of `mean`, `variance` and `target` alone (the spherical ones), whose weight gradient is the sum of
    `(W - mean row) R + 1 r' + the targets' rows` over the batches, with R a D x D matrix: inside the block only R, r
    and the targets' rows are made, and `V D^2` is left for its end. `weight.grad` is whole after the block, equal to
    that of plain accumulation up to rounding, and not before; all other gradients, those of other losses and of a tied
    embedding among them, go their usual way at once. The weight may not change inside. A block that raises leaves out
    what was collected. It takes a float32 buffer of the weight's shape, which becomes the gradient.

    In data-parallel training, `process_group` reduces R, r and the targets' rows at the end of the block in place of
    the gradient: D^2 numbers and D a target in place of V D. The gradient is the mean over the processes, as that of
    DistributedDataParallel, which must leave the weight out:

        model._ddp_params_and_buffers_to_ignore = ["lm_head.weight"]  # before DistributedDataParallel(model)

    An error in the block of one process is raised in all that reach its end.

    Under autocast, and where sharding puts another tensor in the weight's place, every pass makes its own gradient.

    Args:
        head: a patched model, or the weight (V, D) itself for losses called as functions.
        process_group: processes with the same weight and batches of their own; `torch.distributed.group.WORLD` is all.

    Raises:
        ValueError: a model that is not patched; a weight that needs no gradient, that is accumulated already or that
            has gradient hooks, which would never see the gradient; several processes without a process group, between
            which it would not be reduced; a weight that DistributedDataParallel reduces.
        RuntimeError: the weight changed, or its optimizer took a step, inside the block; with a process group also a
            weight with a gradient from elsewhere, a tied embedding's, and a process without any.
    """
    weights = _weights(head)
    exchange = None if process_group is None else Exchange(process_group)
    for weight in weights:
        _check(weight)
    _check_processes(head, weights, exchange)
    pending = [Pending(weight, exchange) for weight in weights]

    def refuse(optimizer: Optimizer, arguments: Any, named: Any) -> None:
        stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(put_off(parameter) for parameter in stepped):
            raise RuntimeError(
                "optimizer.step() inside `with xhead.accumulate(...)`, where the projection's gradient is not whole "
                "yet: leave the block first"
            )

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(refuse).remove)
        for each in pending:
            each.start()
            stack.callback(each.abandon)
        with nullcontext() if exchange is None else exchange.together():
            yield
        for each in pending:
            each.finish()


def _weights(head: nn.Module | Tensor) -> list[Tensor]:
    if isinstance(head, Tensor):
        return [head]
    weights = {id(layer.weight): layer.weight for layer in cut_layers(head)}
    if not weights:
        raise ValueError(
            f"{type(head).__name__} is not patched: call xhead.patch(model, loss=...) first, or give the weight itself"
        )
    return [weight for weight in weights.values() if weight.requires_grad]


def _check(weight: Tensor) -> None:
    if not (weight.is_leaf and weight.requires_grad):
        raise ValueError("the weight must be a leaf that requires a gradient, since its .grad is what is accumulated")
    if put_off(weight):
        raise ValueError("the gradient of this weight is being accumulated already: one block at a time")
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            "the weight has gradient hooks, which would not see the gradient that is made at the end of the block; "
            "remove them, or accumulate without xhead.accumulate"
        )


def _check_processes(head: nn.Module | Tensor, weights: list[Tensor], exchange: Exchange | None) -> None:
    if exchange is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise ValueError(
                f"xhead.accumulate in one of {processes} processes: the gradient made at the end of the block would "
                "not be reduced between them; give process_group=, or accumulate without it"
            )
    if isinstance(head, DistributedDataParallel):
        mine = {id(weight) for weight in weights}
        named = [name for name, value in head.module.named_parameters() if id(value) in mine]
        names = [name for name in named if name not in head.parameters_to_ignore]
        if names:
            raise ValueError(
                f"DistributedDataParallel reduces {', '.join(names)}, V x D numbers, before its gradient is whole: set "
                f"model._ddp_params_and_buffers_to_ignore = {names} on the model that it wraps, before it does"
            )
