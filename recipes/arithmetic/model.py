"""A small model from scratch."""

from __future__ import annotations

from typing import Any

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from recipes.arithmetic.encoding import END, PAD
from recipes.arithmetic.options import ModelOptions


def build_model(options: ModelOptions, vocabulary: int, longest: int, seed: int) -> Any:
    """The model, with weights that depend on the seed alone."""
    set_seed(seed)
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None}
    tokens["decoder_start_token_id"] = PAD if options.model == "t5" else None
    width, layers, heads = options.hidden_size, options.layers, options.attention_heads
    if options.model == "t5":
        config = T5Config(
            d_model=width, d_kv=width // heads, d_ff=4 * width, num_layers=layers, num_heads=heads, dropout_rate=0.0,
            **tokens,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        # T5 ignores the Trainer's count of labels; so accumulated batches equal one large one.
        model.accepts_loss_kwargs = False  # pyright: ignore
        return model
    if options.model == "gpt2":
        config = GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, n_positions=longest,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=longest, **tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config)
