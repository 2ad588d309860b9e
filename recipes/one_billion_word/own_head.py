"""Models whose output head brings its own loss, in the place of the linear projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from recipes.one_billion_word.packing import IGNORED


class OwnHead:
    """Mixed into a causal language model: its projection goes, and `own_head`, made from it, gives scores and loss.

    start: called with the projection before. options: what `make_head` takes beside it.
    """

    own_head: nn.Module

    def __init__(
        self, config: PretrainedConfig, start: Callable[[nn.Linear], None] | None = None, **options: Any
    ) -> None:
        config.tie_word_embeddings = False
        super().__init__(config)  # pyright: ignore
        if start is not None:
            start(self.lm_head)  # pyright: ignore
        self.own_head = self.make_head(self.lm_head, **options)  # pyright: ignore
        del self.lm_head  # pyright: ignore

    @staticmethod
    def make_head(projection: nn.Linear, **options: Any) -> nn.Module:
        raise NotImplementedError

    def all_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V)"""
        raise NotImplementedError

    def loss_sum(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """hidden: (N, D), target: (N,) -> ()"""
        raise NotImplementedError

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
        """The mean loss of the labels that count, or their sum by `num_items_in_batch`; without labels, all scores."""
        body = self.base_model  # pyright: ignore
        hidden = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        if labels is None:
            return CausalLMOutput(logits=self.all_scores(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]))  # pyright: ignore
        following = labels[:, 1:]
        counts = following != IGNORED
        loss = self.loss_sum(hidden[:, :-1][counts], following[counts])
        return CausalLMOutput(loss=loss / (counts.sum() if num_items_in_batch is None else num_items_in_batch))  # pyright: ignore
