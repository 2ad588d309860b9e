"""Inputs to vectors: any Hugging Face encoder, a small one trained from nothing, or bags of words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel

from recipes.common.errors import RecipeError
from recipes.extreme_classification.neural.options import TF_IDF, NeuralOptions
from recipes.extreme_classification.neural.sentence_folder import transformer_of

_PADDING = 0  # of the tokenizers that are trained from nothing


class TextEncoder(nn.Module):
    """A transformer whose last states are pooled: `mean` over the tokens, or `cls`, the first one's."""

    def __init__(self, backbone: nn.Module, pooling: str, size: int):
        super().__init__()
        self.backbone, self.pooling, self.size = backbone, pooling, size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, T) ids and mask -> (b, D)"""
        length = int(attention_mask.sum(1).max())
        input_ids, attention_mask = input_ids[:, :length].long(), attention_mask[:, :length].long()
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (b, T, D)
        if self.pooling == "cls":
            return states[:, 0]
        mask = attention_mask[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


class BagEncoder(nn.Module):
    """The mean of the tokens' vectors, and what a layer with a residual makes of it."""

    def __init__(self, vocabulary: int, size: int, dropout: float):
        super().__init__()
        self.size = size
        self.bag = nn.EmbeddingBag(vocabulary, size, mode="mean", padding_idx=_PADDING)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(size, 2 * size), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * size, size)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, T) ids and mask -> (b, D)"""
        length = int(attention_mask.sum(1).max())
        bag = self.bag(input_ids[:, :length].long())
        return bag + self.layers(bag)


class FeatureEncoder(nn.Module):
    """The weighted sum of the features' vectors. Dropout leaves out whole features.

    Random vectors of length about 1 keep the features' inner products on average, so that it starts from the cosine of
    tf-idf.
    """

    def __init__(self, features: int, size: int, dropout: float):
        super().__init__()
        self.size, self.dropout = size, dropout
        self.bag = nn.EmbeddingBag(features, size, mode="sum")
        nn.init.normal_(self.bag.weight, std=size**-0.5)

    def forward(self, feature_ids: Tensor, weights: Tensor) -> Tensor:
        """(b, T) ids and weights, 0 for none -> (b, D)"""
        kept = weights != 0
        if self.training and self.dropout:
            kept &= torch.rand_like(weights) >= self.dropout
        counts = kept.sum(1)
        return self.bag(feature_ids[kept].long(), counts.cumsum(0) - counts, per_sample_weights=weights[kept])


Encoder = TextEncoder | BagEncoder | FeatureEncoder


def make_encoder(options: NeuralOptions, vocabulary: int) -> Encoder:
    """The encoder that the options name; those trained from nothing are for so many tokens or features."""
    if options.encoder == TF_IDF:
        return FeatureEncoder(vocabulary, options.hidden_size, options.dropout)
    if options.encoder == "bag":
        return BagEncoder(vocabulary, options.hidden_size, options.dropout)
    if options.encoder == "tiny":
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden_size // 32),
            intermediate_size=4 * options.hidden_size,
            max_position_embeddings=options.max_length,
            hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.dropout,
            pad_token_id=_PADDING,
        )
        return TextEncoder(BertModel(config, add_pooling_layer=False), options.pooling, options.hidden_size)
    try:
        backbone = AutoModel.from_pretrained(transformer_of(options.encoder))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--encoder {options.encoder!r} cannot be loaded: {error}") from error
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = options.dropout
    return TextEncoder(backbone, options.pooling, backbone.config.hidden_size)
