"""Models with an adaptive softmax, torch.nn.AdaptiveLogSoftmaxWithLoss, in the place of the linear projection.

Source: arXiv 1609.04309. Frequent words are scored in full, the rest in clusters of narrower projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from recipes.one_billion_word.ngram import NgramForCausalLM
from recipes.one_billion_word.packing import IGNORED

CUTOFFS = (60_000, 100_000, 640_000)
BENCHMARK_WORDS = 793_471
NARROWEST = 4


def cutoffs(words: int) -> list[int]:
    """Where the clusters begin: the benchmark's cutoffs where there are as many words, else in the same proportions."""
    if words > CUTOFFS[-1]:
        return list(CUTOFFS)
    scaled = [max(1, round(words * cutoff / BENCHMARK_WORDS)) for cutoff in CUTOFFS]
    return sorted({cutoff for cutoff in scaled if cutoff < words})


def narrowing(size: int, clusters: int) -> float:
    """How many times narrower each cluster is than the one before: 4, or less where the last would be below 4 wide."""
    return max(1.0, min(4.0, (size / NARROWEST) ** (1 / clusters)))


class AdaptiveHead:
    """Mixed into a causal language model: its projection goes, and an adaptive softmax gives the loss."""

    def __init__(self, config: PretrainedConfig) -> None:
        config.tie_word_embeddings = False
        super().__init__(config)  # pyright: ignore
        del self.lm_head  # pyright: ignore
        words, size = config.vocab_size, config.hidden_size  # pyright: ignore
        clusters = cutoffs(words)
        self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(size, words, clusters, div_value=narrowing(size, len(clusters)))

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: torch.Tensor,  # (B, L)
        labels: torch.Tensor | None = None,  # (B, L)
        position_ids: torch.Tensor | None = None,  # (B, L)
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """The mean loss of the labels that count, or their sum by `num_items_in_batch`; without labels, log p."""
        body = self.base_model  # pyright: ignore
        hidden = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        if labels is None:
            return CausalLMOutput(logits=self.adaptive.log_prob(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]))
        following = labels[:, 1:]
        counts = following != IGNORED
        log_p = self.adaptive(hidden[:, :-1][counts], following[counts]).output
        return CausalLMOutput(loss=-log_p.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch))


class AdaptiveLlama(AdaptiveHead, LlamaForCausalLM):
    """The transformer with an adaptive softmax."""


class AdaptiveNgram(AdaptiveHead, NgramForCausalLM):
    """The n-gram network with an adaptive softmax."""
