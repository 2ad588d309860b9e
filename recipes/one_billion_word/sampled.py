"""Sampled softmax: cross-entropy against a few words drawn by frequency, corrected for how often they are drawn.

Source: arXiv 1412.2007. A loss of one's own on lazy logits: it asks for the target's logit and those of the words
drawn.
"""

from __future__ import annotations

import math

import torch

from xhead import LazyLogits

SAMPLES = 8192
SHARE = 4  # at least so many times more words than samples by default


class SampledSoftmax:
    """`-log( e^{o_y - log q_y} / (e^{o_y - log q_y} + sum_j e^{o_j - log q_j}) )`, q the expected number of draws.

    The words are drawn with replacement, once a call for all rows, log-uniformly over their ids, which are ranks of
    frequency: `p_k = log((k + 2) / (k + 1)) / log(V + 1)`. A draw that is a row's own target does not count in it.

    Args:
        samples: words drawn a call; by default 8192, but no more than a quarter of the vocabulary.
        seed: of the draws.
    """

    def __init__(self, samples: int | None = None, seed: int = 0) -> None:
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.samples, self.seed = samples, seed
        self._generator: torch.Generator | None = None

    def __call__(self, logits: LazyLogits, labels: torch.Tensor) -> torch.Tensor:
        """logits: (n, V), labels: (n,) -> (n,)"""
        words = logits.shape[-1]
        samples = self.samples or max(1, min(SAMPLES, words // SHARE))
        drawn = self.draw(samples, words, labels.device)
        target = logits.statistics("target", target=labels).target
        assert target is not None
        target = target - self.log_expected(labels, samples, words)
        others = logits.class_logits(drawn) - self.log_expected(drawn, samples, words)  # (n, samples)
        others = others.masked_fill(drawn[None, :] == labels[:, None], -torch.inf)
        return torch.cat([target[:, None], others], 1).logsumexp(1) - target

    def draw(self, samples: int, words: int, device: torch.device) -> torch.Tensor:
        """Word ids, (samples,)."""
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        uniform = torch.rand(samples, generator=self._generator, device=device, dtype=torch.float64)
        return (torch.exp(uniform * math.log(words + 1)) - 1).long().clamp(0, words - 1)

    @staticmethod
    def log_expected(ids: torch.Tensor, samples: int, words: int) -> torch.Tensor:
        """log of how often each word is drawn on average: ids (...) -> (...)"""
        ids = ids.double()
        return (samples * torch.log((ids + 2) / (ids + 1)) / math.log(words + 1)).log().float()
