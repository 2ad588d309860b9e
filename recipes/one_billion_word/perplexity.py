"""Exact perplexity: exp of the mean negative log-likelihood over every token that counts, full vocabulary.

Nothing is averaged before the end: the sum of the negative log-likelihoods and the number of tokens are added up over
batches and over processes, and divided once. Logits exist for a few rows at a time, so any vocabulary fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from recipes.one_billion_word.packing import IGNORED

MAX_LOGITS = 1 << 25  # 128 MiB of float32 at a time: 42 rows of the benchmark's vocabulary, 2,500 of the embedded one


@dataclass(frozen=True)
class Perplexity:
    """What was measured: `nll` is the sum in nats over `tokens` tokens."""

    nll: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel,
    blocks: Dataset[dict[str, torch.Tensor]],
    *,
    batch_size: int = 16,
    max_logits: int = MAX_LOGITS,
    progress: str | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on packed blocks; in a distributed run, each process scores its share.

    Args:
        model: its body gives hidden states, its output embeddings logits, with nothing between logits and softmax.
        blocks: items as `PackedSentences` gives them.
        batch_size: blocks at a time through the body.
        max_logits: numbers held at a time by the head.
        progress: a title for a progress bar, or None for no bar.

    Returns:
        The same sums on every process.
    """
    state = PartialState()
    share = Subset(blocks, range(state.process_index, len(blocks), state.num_processes))  # pyright: ignore
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        disable = None if progress else True  # None: no bar where the output is not a terminal
        for batch in tqdm(DataLoader(share, batch_size=batch_size), desc=progress, leave=False, disable=disable):
            hidden, target = hidden_and_targets(model, {name: value.to(device) for name, value in batch.items()})
            totals[0] += _sum_nll(model, hidden, target, max_logits)
            totals[1] += len(target)
    finally:
        model.train(was_training)
    if state.num_processes > 1:
        on_device = totals.to(state.device)
        torch.distributed.all_reduce(on_device)
        totals = on_device.cpu()
    return Perplexity(nll=totals[0].item(), tokens=int(totals[1].item()))


def hidden_and_targets(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],  # each (B, L)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that predict a token that counts, and those tokens.

    Returns:
        hidden (N, D) and target (N,), in the order of the blocks.
    """
    body = model.base_model
    output = body(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    following = batch["labels"][:, 1:]
    counts = following != IGNORED
    return output.last_hidden_state[:, :-1][counts], following[counts]


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The projection from hidden states to logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise TypeError(f"{type(model).__name__} has {type(head).__name__} as output embeddings; a Linear is needed")
    return head


def _sum_nll(
    model: PreTrainedModel,
    hidden: torch.Tensor,  # (N, D)
    target: torch.Tensor,  # (N,)
    max_logits: int,
) -> float:
    head = output_head(model)
    rows = max(1, max_logits // model.config.vocab_size)
    total = 0.0
    for some_hidden, some_target in zip(hidden.split(rows), target.split(rows), strict=True):
        logits = head(some_hidden).float()  # (rows, V)
        total += F.cross_entropy(logits, some_target, reduction="none").double().sum().item()
    return total
