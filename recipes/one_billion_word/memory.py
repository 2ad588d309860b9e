"""Peak memory, measured: of one loss call, and of the process.

The loss is measured from the moment the hidden states exist: the output projection and the loss of the model itself,
forward and backward, at the shape of a training batch. On the CPU the profiler reports every allocation and release of
torch's allocator; on a GPU the allocator keeps the peak itself.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from recipes.one_billion_word.packing import IGNORED
from recipes.one_billion_word.scoring import output_head


def measure_loss_memory(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],  # each (B, L)
    autocast: AbstractContextManager[Any],
) -> dict[str, int]:
    """Bytes that one forward and backward of projection and loss take above what is there before.

    Args:
        model: a causal language model, patched or not; its gradients are dropped.
        batch: as the training gives it.
        autocast: the context that training runs the forward in.

    Returns:
        peak: the largest sum of bytes held at once, the gradients of weight and hidden states included.
        gradients: the bytes of those gradients, which any loss has to make.
        logits: the bytes of the logits in float32, for comparison.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    body, weight = model.base_model, output_head(model).weight
    with torch.no_grad(), autocast:
        states = body(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    hidden = states.last_hidden_state.detach().requires_grad_()
    counted = (batch["labels"][:, 1:] != IGNORED).sum()

    def loss_and_gradients() -> None:
        with autocast:
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=counted).loss
        loss.backward()

    # The model's own forward runs, with the hidden states already there: what it allocates is projection and loss.
    with _answering(body, BaseModelOutputWithPast(last_hidden_state=hidden)):  # pyright: ignore
        loss_and_gradients()  # once unmeasured, so that what is allocated for good at first use does not count
        model.zero_grad(set_to_none=True)
        hidden.grad = None
        peak = _peak_cuda(loss_and_gradients) if hidden.is_cuda else _peak_cpu(loss_and_gradients)
    gradients = hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size()
    model.zero_grad(set_to_none=True)
    return {"peak": peak, "gradients": gradients, "logits": hidden[..., 0].numel() * weight.shape[0] * 4}


@contextmanager
def _answering(body: torch.nn.Module, output: Any) -> Iterator[None]:
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del body.forward  # the class's own is behind it


def _peak_cuda(call: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(call: Callable[[], None]) -> int:
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    recorded: Any = profile.profiler
    events = recorded.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def reset_process_peak() -> bool:
    """Start the process's peak anew. False where the system cannot: the peak then counts from the process's start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def process_peak() -> int:
    """The largest resident memory of the process in bytes, or of the GPU's allocator where there is a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
