"""A feed-forward n-gram model: the embeddings of the last words of a sentence, side by side, through hidden layers.

The network of the Z-loss paper (arXiv 1604.08859) has 10-grams, embeddings of 512 and hidden layers of 2048, 2048 and
512; a 10-gram is read here as nine words of context and the one that is predicted. The activation is tanh.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class NgramConfig(PretrainedConfig):
    """Sizes of the network. context: words that the next one is predicted from, those before the sentence being <S>."""

    model_type = "one_billion_word_ngram"

    def __init__(
        self,
        vocab_size: int = 1000,
        context: int = 9,
        embedding_size: int = 512,
        hidden_sizes: tuple[int, ...] = (2048, 2048, 512),
        bos_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**(kwargs | {"bos_token_id": bos_token_id, "tie_word_embeddings": False}))
        self.vocab_size, self.context, self.embedding_size = vocab_size, context, embedding_size
        self.hidden_sizes = list(hidden_sizes)
        self.hidden_size = self.hidden_sizes[-1]


class NgramBody(nn.Module):
    """Words to hidden states."""

    def __init__(self, config: NgramConfig) -> None:
        super().__init__()
        self.start, self.context = config.bos_token_id, config.context
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        sizes = [config.context * config.embedding_size, *config.hidden_sizes]
        self.layers = nn.ModuleList(nn.Linear(size, after) for size, after in itertools.pairwise(sizes))

    def forward(
        self,
        input_ids: torch.Tensor,  # (B, L)
        position_ids: torch.Tensor | None = None,  # (B, L)
        **_: Any,
    ) -> BaseModelOutput:
        """(B, L, D): each place sees its own word and those before it in the same sentence."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        words = [
            F.pad(input_ids, (back, 0))[:, : input_ids.shape[1]].masked_fill(position_ids < back, self.start)
            for back in range(self.context)
        ]
        hidden = self.embedding(torch.stack(words, -1)).flatten(-2)  # (B, L, context * embedding)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return BaseModelOutput(last_hidden_state=hidden)  # pyright: ignore


class NgramForCausalLM(PreTrainedModel):
    """The n-gram network with a linear projection to the words, as transformers has its causal language models."""

    config_class = NgramConfig
    base_model_prefix = "body"

    def __init__(self, config: NgramConfig) -> None:
        super().__init__(config)
        self.body = NgramBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)

    def forward(
        self,
        input_ids: torch.Tensor,  # (B, L)
        labels: torch.Tensor | None = None,  # (B, L)
        position_ids: torch.Tensor | None = None,  # (B, L)
        **kwargs: Any,
    ) -> CausalLMOutput:
        """As the causal language models of transformers: labels are shifted here."""
        logits = self.lm_head(self.body(input_ids, position_ids).last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
