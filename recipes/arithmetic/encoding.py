"""Characters as tokens, and problems as batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.arithmetic.problems import Problem

_SPECIAL = ("<pad>", "<end>", "<answer>", "<other>")
PAD, END, ANSWER = range(3)
IGNORED = -100


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token a printable ASCII character, so that each digit is one."""
    tokens = [*_SPECIAL, *(chr(code) for code in range(32, 127))]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<other>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<other>")


class Batches:
    """Problems as what a model takes. Only the answer and its end are labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, encoder_decoder: bool):
        self.tokenizer, self.encoder_decoder = tokenizer, encoder_decoder

    def encode(self, problem: Problem) -> dict[str, list[int]]:
        """Token ids of the question, with the mark that asks for the answer, and of the answer with its end."""
        question = [*self._ids(problem.question), ANSWER]
        return {"question": question, "answer": [*self._ids(problem.answer), END]}

    def training(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Token ids, their mask and labels, padded on the right."""
        if self.encoder_decoder:
            batch = self._padded([each["question"] for each in features])
            return {**batch, "labels": _pad([each["answer"] for each in features], IGNORED)}
        batch = self._padded([each["question"] + each["answer"] for each in features])
        labels = [[IGNORED] * len(each["question"]) + each["answer"] for each in features]
        return {**batch, "labels": _pad(labels, IGNORED)}

    def questions(self, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """The questions alone, padded on the side that the model does not go on from."""
        return self._padded([self.encode(each)["question"] for each in problems], left=not self.encoder_decoder)

    def answers(self, generated: Tensor, questions: dict[str, Tensor]) -> list[str]:
        """What the model wrote after the questions, up to the first end."""
        start = 1 if self.encoder_decoder else questions["input_ids"].shape[1]
        texts = []
        for row in generated[:, start:].tolist():
            tokens: Any = self.tokenizer.convert_ids_to_tokens(row[: row.index(END)] if END in row else row)
            texts.append("".join(tokens))
        return texts

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore

    def _padded(self, rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
        ids = _pad(rows, PAD, left)
        return {"input_ids": ids, "attention_mask": _pad([[1] * len(row) for row in rows], 0, left)}


def _pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for pad, row in zip(fill, rows, strict=True)])
