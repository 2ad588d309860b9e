"""The model, a small stock Llama of transformers or an n-gram network over the words of a vocabulary; and its patch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

import xhead
from recipes.common.errors import RecipeError
from recipes.one_billion_word.adaptive import AdaptiveLlama, AdaptiveNgram
from recipes.one_billion_word.ngram import NgramConfig, NgramForCausalLM
from recipes.one_billion_word.options import ADAPTIVE, NGRAM, SAMPLED, SPHERICAL, STOCK, ModelOptions
from recipes.one_billion_word.sampled import SampledSoftmax
from recipes.one_billion_word.spherical import SphericalLlama, SphericalNgram, SphericalOutput, head_options
from recipes.one_billion_word.vocabulary import Vocabulary
from xhead.losses import get_loss
from xhead.losses.spherical_family import FAMILY


def build_model(options: ModelOptions, vocabulary: Vocabulary, block_length: int, seed: int) -> PreTrainedModel:
    """A model with random weights that depend on nothing but the shapes and the seed."""
    set_seed(seed)
    start = start_at_frequencies(options, vocabulary)
    own = head_options(options) if options.head == SPHERICAL else {}
    if options.network == NGRAM:
        config = NgramConfig(
            vocab_size=len(vocabulary),
            context=options.context,
            embedding_size=options.embedding_size,
            hidden_sizes=options.parsed_hidden_sizes,
            bos_token_id=vocabulary.start,
        )
        if options.head in (ADAPTIVE, SPHERICAL):
            return {ADAPTIVE: AdaptiveNgram, SPHERICAL: SphericalNgram}[options.head](config, start, **own)
        model = NgramForCausalLM(config)
        start(model.lm_head)
        return model
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3,  # what keeps a gated layer as large as an ungated one
        num_hidden_layers=options.layers,
        num_attention_heads=options.attention_heads,
        max_position_embeddings=block_length,
        tie_word_embeddings=options.tie_embeddings,
        bos_token_id=vocabulary.start,
        eos_token_id=vocabulary.end,
        pad_token_id=None,
        use_cache=False,
    )
    if options.head in (ADAPTIVE, SPHERICAL):
        return {ADAPTIVE: AdaptiveLlama, SPHERICAL: SphericalLlama}[options.head](config, **own)
    return LlamaForCausalLM(config)


def start_at_frequencies(options: ModelOptions, vocabulary: Vocabulary) -> Callable[[nn.Linear], None]:
    """Starts a projection's bias at the logarithm of the words' counts, for losses of a softmax.

    From 0, a softmax learns the frequencies through the hidden layers first, and leaves their tanh saturated. The
    spherical losses start from 0: they see scores relative to their spread, which the counts would fill. Where the
    vocabulary has no counts, the rank k is taken to have 1 / k.
    """

    @torch.no_grad()
    def start(projection: nn.Linear) -> None:
        if options.head == SPHERICAL or options.loss in FAMILY:
            projection.bias.zero_()
            return
        ranks = torch.arange(1, len(vocabulary) + 1)
        counts = 1 / ranks if vocabulary.counts is None else torch.tensor(vocabulary.counts).clamp(min=1)
        logarithms = counts.double().log()
        projection.bias.copy_(logarithms - logarithms.mean())

    return start


def check_loss(options: ModelOptions) -> None:
    """Fail before any data is read when the loss or an option of it is unknown.

    Raises:
        RecipeError: with the names that are known.
    """
    if options.loss == STOCK:
        return
    is_sum = any(sign in options.loss for sign in "+*")  # which `get_loss` reads
    if not is_sum and options.loss not in (SAMPLED, *xhead.list_losses()):
        raise RecipeError(f"--loss is {options.loss!r}; known: {', '.join([STOCK, SAMPLED, *xhead.list_losses()])}")
    loss_options = {name: value for name, value in options.parsed_loss_options.items() if name != "lazy_eval"}
    try:
        SampledSoftmax(**loss_options) if options.loss == SAMPLED else get_loss(options.loss, **loss_options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"--loss {options.loss} --loss_options {options.loss_options}: {error}") from error


def apply_loss(model: PreTrainedModel, options: ModelOptions) -> PreTrainedModel:
    """Patch the model unless the stock loss is wanted."""
    if options.loss == STOCK:
        return model
    if options.loss == SAMPLED:
        return xhead.patch(model, loss=SampledSoftmax(**options.parsed_loss_options))
    return xhead.patch(model, loss=options.loss, **options.parsed_loss_options)


def count_parameters(model: PreTrainedModel) -> int:
    """How many numbers the model learns. A spherical head's are no parameters; one parameter stands for them."""
    own = model.own_head.weight.factor.numel() - 1 if isinstance(model, SphericalOutput) else 0
    return model.num_parameters() + own
