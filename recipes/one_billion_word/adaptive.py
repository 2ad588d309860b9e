"""Models with an adaptive softmax, torch.nn.AdaptiveLogSoftmaxWithLoss, in the place of the linear projection.

Source: arXiv 1609.04309. Frequent words are scored in full, the rest in clusters of narrower projections.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM

from recipes.one_billion_word.ngram import NgramForCausalLM
from recipes.one_billion_word.own_head import OwnHead

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


class AdaptiveHead(OwnHead):
    """An adaptive softmax gives the loss, and log p as the scores.

    A projection with a bias lends it to the words that are scored in full, and to the clusters their words' together.
    """

    own_head: nn.AdaptiveLogSoftmaxWithLoss

    @staticmethod
    @torch.no_grad()
    def make_head(projection: nn.Linear) -> nn.AdaptiveLogSoftmaxWithLoss:
        size, words, bias = projection.in_features, projection.out_features, projection.bias
        clusters = cutoffs(words)
        div_value = narrowing(size, len(clusters))
        has_bias = bias is not None
        head = nn.AdaptiveLogSoftmaxWithLoss(size, words, clusters, div_value=div_value, head_bias=has_bias)
        if has_bias:
            frequent, *rest = bias.tensor_split(clusters)
            head.head.bias.copy_(torch.cat([frequent, torch.stack([each.logsumexp(0) for each in rest])]))
        return head

    def all_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.own_head.log_prob(hidden)

    def loss_sum(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # A cluster with no word in a batch gets a gradient of zeros, not none: processes meet to add them all up.
        unused = sum(parameter.sum() for parameter in self.own_head.parameters())
        return 0 * unused - self.own_head(hidden, target).output.sum()


class AdaptiveLlama(AdaptiveHead, LlamaForCausalLM):
    """The transformer with an adaptive softmax."""


class AdaptiveNgram(AdaptiveHead, NgramForCausalLM):
    """The n-gram network with an adaptive softmax."""
