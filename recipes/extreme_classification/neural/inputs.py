"""Texts as an encoder reads them: token ids, or weighted features. Memory holds those of a batch, padded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes.common.errors import RecipeError
from recipes.extreme_classification.features import TfIdf, largest
from recipes.extreme_classification.neural.options import FROM_NOTHING, TF_IDF, NeuralOptions
from recipes.extreme_classification.neural.sentence_folder import transformer_of
from recipes.extreme_classification.readers.tokens import TokenIds, padded, tokenize

_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_TOKENIZER = "tokenizer"


class Inputs(Protocol):
    """What an encoder takes for many texts."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The encoder's arguments for some of them, each (rows, T), padded on the right to the longest."""
        ...


class TokenInputs:
    """`input_ids` and `attention_mask`, int32."""

    def __init__(self, ids: Sequence[np.ndarray] | TokenIds, padding: int) -> None:
        self.ids, self.padding = ids, padding

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        ids, mask = padded([self.ids[int(row)] for row in rows], self.padding)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


class FeatureInputs:
    """`feature_ids`, int32, and their `weights`, float32, 0 at the padding."""

    def __init__(self, features: csr_matrix) -> None:
        self.features = features

    def __len__(self) -> int:
        return self.features.shape[0]  # pyright: ignore

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        part = self.features[rows]
        counts = np.diff(part.indptr)
        inside = np.arange(counts.max(initial=0)) < counts[:, None]
        ids, weights = np.zeros(inside.shape, np.int32), np.zeros(inside.shape, np.float32)
        ids[inside], weights[inside] = part.indices, part.data
        return {"feature_ids": torch.from_numpy(ids), "weights": torch.from_numpy(weights)}


class TokenReader:
    """Token ids of texts, cut to `max_length`; kept in a file where one is named, in memory otherwise."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.size = len(tokenizer)

    def __call__(self, texts: Sequence[str], file: Path | None = None) -> TokenInputs:
        padding = self.tokenizer.pad_token_id or 0
        assert isinstance(padding, int)
        if file is not None:
            return TokenInputs(tokenize(texts, self.tokenizer, self.max_length, file), padding)
        found = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"] if texts else []
        return TokenInputs([np.array(ids, np.int32) for ids in found], padding)  # pyright: ignore

    def save(self, folder: Path) -> None:
        """Write the folder `tokenizer`."""
        self.tokenizer.save_pretrained(folder / _TOKENIZER)


class FeatureReader:
    """tf-idf of texts, the `max_length` largest of each."""

    def __init__(self, tf_idf: TfIdf, max_length: int) -> None:
        self.tf_idf, self.max_length = tf_idf, max_length
        self.size = len(tf_idf.features)

    def __call__(self, texts: Sequence[str], file: Path | None = None) -> FeatureInputs:
        return FeatureInputs(largest(self.tf_idf(texts), self.max_length))

    def save(self, folder: Path) -> None:
        """Write features.json."""
        self.tf_idf.save(folder)


Reader = TokenReader | FeatureReader


def make_reader(options: NeuralOptions, texts: Sequence[str]) -> Reader:
    """A Hugging Face encoder's own tokenizer, or a WordPiece tokenizer or features made from the texts.

    Raises:
        RecipeError: no such model, or no text holds a word.
    """
    if options.encoder == TF_IDF:
        return FeatureReader(TfIdf.fit(texts, limit=options.vocab_size), options.max_length)
    if options.encoder not in FROM_NOTHING:
        try:
            return TokenReader(AutoTokenizer.from_pretrained(transformer_of(options.encoder)), options.max_length)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"--encoder is {options.encoder!r}; it must be one of {', '.join(FROM_NOTHING)}, or a model of "
                f"Hugging Face or a folder of one: {error}"
            ) from error
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
    return TokenReader(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL), options.max_length)


def load_reader(options: NeuralOptions, folder: Path) -> Reader:
    """What `save` of a reader wrote."""
    if options.encoder == TF_IDF:
        return FeatureReader(TfIdf.load(folder), options.max_length)
    return TokenReader(AutoTokenizer.from_pretrained(folder / _TOKENIZER), options.max_length)
