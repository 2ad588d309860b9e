"""The codebook in the place of the projection: `--head vq`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

import xhead
from recipes.common.errors import RecipeError
from recipes.one_billion_word.options import VQ, ModelOptions
from recipes.one_billion_word.vocabulary import Vocabulary
from xhead.heads import read_options
from xhead.heads.codes import code_floor

WORDS_A_CODE = 16


def options_of(options: ModelOptions, words: int) -> dict[str, Any]:
    """The head's options: those given, over the defaults for a model from scratch or from a trained one."""
    size = options.parsed_head_options.get("codebook_size", max(2, words // WORDS_A_CODE))
    chosen = {"codebook_size": size, "frequent": size // 2, "start": "frequency", "token_bias": "frequency"}
    if options.start_from is not None:
        chosen |= {"start": "kmeans", "token_bias": "learned"}
    return chosen | options.parsed_head_options


def check_vq(options: ModelOptions) -> None:
    """Fail before any data is read when an option of the head is unknown or out of range.

    Raises:
        RecipeError: with what is allowed.
    """
    if options.head != VQ:
        return
    try:
        read_options(VQ, options_of(options, words=WORDS_A_CODE * 64))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"--head vq --head_options {options.head_options}: {error}") from error


def token_counts(vocabulary: Vocabulary) -> torch.Tensor:
    """(V,) how often each word is predicted in the training text.

    Raises:
        RecipeError: the vocabulary file has no counts.
    """
    if vocabulary.counts is None:
        raise RecipeError("--head vq needs the words' counts: give a --vocab with `word count` lines, or none")
    counts = torch.tensor(vocabulary.counts)
    counts[vocabulary.start] = 0
    return counts


def apply_vq(model: PreTrainedModel, options: ModelOptions, vocabulary: Vocabulary) -> None:
    """Replace the projection where the options ask for it, and print what no training of the codebook can beat.

    Raises:
        RecipeError: the head cannot be made with these options and words.
    """
    if options.head != VQ:
        return
    counts = token_counts(vocabulary)
    chosen = options_of(options, len(vocabulary))
    try:
        xhead.patch(model, head=VQ, **chosen, token_counts=counts)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"--head vq --head_options {options.head_options}: {error}") from error
    floor = head_facts(model, options, vocabulary)["floor"]
    residual = f" and {chosen['residual_size']:,} residual ones" if chosen.get("residual_size") else ""
    PartialState().print(
        f"codebook    {chosen['codebook_size']:,} codes{residual} for {len(vocabulary):,} words, "
        f"{chosen['frequent']:,} of them with a code of their own; no loss below {floor:.4f} nats a word on text of "
        "these counts with this mapping"
    )


def head_facts(model: PreTrainedModel, options: ModelOptions, vocabulary: Vocabulary) -> dict[str, Any]:
    """The head's parameters, and for codebooks their options and their floor in nats a word."""
    head = model.get_output_embeddings()
    if head is None:  # an adaptive softmax and a spherical head are no projections
        return {}
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in head.parameters())}
    if options.head == VQ:
        chosen = options_of(options, len(vocabulary))
        cells = head.cells.cpu()  # pyright: ignore
        floor = code_floor(cells, token_counts(vocabulary), chosen["token_bias"] != "none")
        facts |= {"options": chosen, "floor": floor}
    return facts
