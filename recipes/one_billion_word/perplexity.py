"""Exact perplexity and ranking errors over every token that counts, full vocabulary.

Nothing is averaged before the end: the sum of the negative log-likelihoods and the numbers of tokens are added up over
batches and over processes, and divided once. Logits exist for a few rows or classes at a time, so any vocabulary fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from recipes.one_billion_word.packing import IGNORED
from recipes.one_billion_word.scoring import MAX_LOGITS, TOP, LinearScorer, Scorer, output_head


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


def measure_perplexity(
    model: PreTrainedModel,
    blocks: Dataset[dict[str, torch.Tensor]],
    *,
    scorer: Scorer | None = None,
    batch_size: int = 16,
    max_logits: int = MAX_LOGITS,
    progress: str | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on packed blocks; in a distributed run, each process scores its share.

    Args:
        model: its body gives hidden states.
        blocks: items as `PackedSentences` gives them.
        scorer: what the head makes of them; by default the softmax of the model's output embeddings.
        batch_size: blocks at a time through the body.
        max_logits: numbers held at a time by the default scorer.
        progress: a title for a progress bar, or None for no bar.

    Returns:
        The same sums on every process.
    """
    scorer = LinearScorer(output_head(model), max_logits=max_logits) if scorer is None else scorer

    def sums(hidden: torch.Tensor, target: torch.Tensor) -> list[float]:
        return [scorer.nll(hidden, target).double().sum().item(), len(target)]

    nll, tokens = _total(model, blocks, sums, 2, batch_size, progress)
    return Perplexity(nll=nll, tokens=int(tokens))


def measure_errors(
    model: PreTrainedModel,
    blocks: Dataset[dict[str, torch.Tensor]],
    scorer: Scorer,
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> dict[int, float]:
    """k -> share of the tokens that are not among the k best words, for the k of `TOP`. Arguments as above."""

    def sums(hidden: torch.Tensor, target: torch.Tensor) -> list[float]:
        found = scorer.ranks(hidden, target)
        return [*((found > k).sum().item() for k in TOP), len(target)]

    *beyond, tokens = _total(model, blocks, sums, len(TOP) + 1, batch_size, progress)
    return {k: count / max(tokens, 1) for k, count in zip(TOP, beyond, strict=True)}


@torch.no_grad()
def _total(
    model: PreTrainedModel,
    blocks: Dataset[dict[str, torch.Tensor]],
    sums: Callable[[torch.Tensor, torch.Tensor], list[float]],
    width: int,
    batch_size: int,
    progress: str | None,
) -> list[float]:
    """`sums(hidden, target)`, which gives `width` numbers, added up over the batches of all processes."""
    state = PartialState()
    share = Subset(blocks, range(state.process_index, len(blocks), state.num_processes))  # pyright: ignore
    device = next(model.parameters()).device
    totals = torch.zeros(width, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        disable = None if progress else True  # None: no bar where the output is not a terminal
        for batch in tqdm(DataLoader(share, batch_size=batch_size), desc=progress, leave=False, disable=disable):
            hidden, target = hidden_and_targets(model, {name: value.to(device) for name, value in batch.items()})
            if len(target):
                totals += torch.tensor(sums(hidden, target), dtype=torch.float64)
    finally:
        model.train(was_training)
    if state.num_processes > 1:
        on_device = totals.to(state.device)
        torch.distributed.all_reduce(on_device)
        totals = on_device.cpu()
    return totals.tolist()


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
