"""Text to vectors: any Hugging Face encoder, a small one trained from nothing, or a bag of words with an MLP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from recipes.extreme_classification.neural.options import NeuralOptions
from recipes.one_billion_word.errors import RecipeError

FROM_NOTHING = ("bag", "tiny")
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_PADDING = 0  # the first of the special tokens


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
        return (states * mask).sum(1) / mask.sum(1)


class BagEncoder(nn.Module):
    """The mean of the tokens' vectors, and what a layer with a residual makes of it."""

    def __init__(self, vocabulary: int, size: int, dropout: float, padding: int):
        super().__init__()
        self.size = size
        self.bag = nn.EmbeddingBag(vocabulary, size, mode="mean", padding_idx=padding)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(size, 2 * size), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * size, size)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, T) ids and mask -> (b, D)"""
        length = int(attention_mask.sum(1).max())
        bag = self.bag(input_ids[:, :length].long())
        return bag + self.layers(bag)


def make_tokenizer(options: NeuralOptions, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A Hugging Face encoder's own, or a WordPiece tokenizer trained on the texts for one that starts from nothing."""
    if options.encoder not in FROM_NOTHING:
        return AutoTokenizer.from_pretrained(options.encoder)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[attr-defined]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[attr-defined]
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.vocab_size, special_tokens=list(_SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    first = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="[CLS] $A [SEP]", special_tokens=first
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def make_encoder(options: NeuralOptions, tokenizer: PreTrainedTokenizerBase) -> TextEncoder | BagEncoder:
    """The encoder that the options name, on the tokenizer's vocabulary."""
    if options.encoder == "bag":
        return BagEncoder(len(tokenizer), options.hidden_size, options.dropout, _PADDING)
    if options.encoder == "tiny":
        config = BertConfig(
            vocab_size=len(tokenizer),
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
        backbone = AutoModel.from_pretrained(options.encoder)
    except OSError as error:
        raise RecipeError(f"--encoder {options.encoder!r} is neither bag nor tiny, nor a model: {error}") from error
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = options.dropout
    return TextEncoder(backbone, options.pooling, backbone.config.hidden_size)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both (n, T) int32, padded on the right to the longest text."""
    found = tokenizer(list(texts), truncation=True, max_length=max_length, padding="longest", padding_side="right")
    return {name: torch.tensor(found[name], dtype=torch.int32) for name in ("input_ids", "attention_mask")}
