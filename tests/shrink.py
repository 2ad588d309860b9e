"""Tiny random models of any transformers class, by rules on the names of configuration fields; nothing about single models."""

import re
from typing import Any

HIDDEN, HEADS, KEY_HEADS, LAYERS, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 4, 2, 2, 96, 128, 32, 8
HEAD = HIDDEN // HEADS

# First match wins; a field that matches nothing keeps its default.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(^|_)(unpadded_)?vocab_size$|^n_vocab$|^vocab_size_\w+$|^n_token$", VOCABULARY),
    (r"(num_)?(key_value|kv)_heads$|num_kv$|^num_key_value_groups$|n_head_kv$|multi_query_group_num", KEY_HEADS),
    (r"head_dim$|^attention_head_size$|^d_kv$|^d_head$|^kv_channels$|^head_size$|_head_dim$", HEAD),
    (r"attention_heads$|num_heads$|n_heads?$|^heads$|^n_head$|num_attn_heads$|_heads$", HEADS),
    (r"(^|_)(num_hidden_layers|n_layers?|num_layers|num_decoder_layers|num_encoder_layers|encoder_layers|decoder_layers)$", LAYERS),
    (r"^(num_\w*layers|\w*n_layers|\w+_layers|depth|num_blocks)$", LAYERS),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|inner_dim|n_inner|d_inner|mlp_dim|ffn_size|ff_dim|feed_forward_size|mlp_hidden_size)$", 2 * HIDDEN),
    (r"^moe_\w*intermediate_size$|expert_\w*size$|^ffn_hidden_size$", 2 * HIDDEN),
    (r"^(num_experts_per_tok|moe_top_?k|top_?k_experts|num_selected_experts|moe_k|num_experts_per_token|topk)$", 2),
    (r"^(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_local_experts|n_experts)$", 4),
    (r"^(n_group|topk_group|n_shared_experts|moe_num_shared_experts|num_shared_experts|num_expert_group|num_limited_groups)$", 1),
    (r"(kv|q|o)_lora_rank$", 16),
    (r"^(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|embedding_dim|word_embed_proj_dim|embedding_size|emb_dim|d_embed|model_dim|width|decoder_hidden_size|encoder_hidden_size|lru_width|attention_hidden_size|projection_dim|out_hidden_size|output_dim|cross_attention_hidden_size|qformer_hidden_size|vision_hidden_size|mm_hidden_size|input_dim|proj_dim|image_embed_dim|embed_size|attn_hidden_size|vision_output_dim|text_hidden_size|token_dim)$", HIDDEN),
    (r"^(state_size|ssm_state_size|mamba_d_state)$", 8),
    (r"(max_position_embeddings|n_positions|max_seq_len|seq_length|n_ctx|max_source_positions|max_target_positions|max_sequence_length|max_position|block_size_positions|tokens_per_sample|max_2d_position_embeddings|context_length|max_context_length)$", POSITIONS),
    (r"^(image_size|img_size|input_size|crop_size)$", IMAGE),
    (r"^patch_size$", PATCH),
    (r"^\w*(sliding_window|attention_window)$", 16),
)
TOKEN = re.compile(r"(_token_id|_token_index|_index|_id|_token_ids|_tokens)$")
ADJUSTED = {"hidden_act"}


def shrink(config: Any) -> Any:
    """A tiny configuration of the same class."""
    tiny = type(config)(**tiny_values(config.to_dict()))
    if tiny.is_encoder_decoder and getattr(tiny, "decoder_start_token_id", None) is None:
        tiny.decoder_start_token_id = 1
    return tiny


def tiny_values(values: dict[str, Any]) -> dict[str, Any]:
    layers = _layer_count(values)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("transformers_version", "model_type", "_name_or_path", "architectures"):
            continue
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")) and name != "quantization_config":
            inner = tiny_values(value)
            if "model_type" in value:
                inner["model_type"] = value["model_type"]
            tiny[name] = inner
        else:
            tiny[name] = _tiny(name, value, layers)
    return tiny


def _layer_count(values: dict[str, Any]) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"):
        if isinstance(values.get(name), int):
            return values[name]
    return None


def _tiny(name: str, value: Any, layers: int | None) -> Any:
    if isinstance(value, (list, tuple)) and layers and len(value) == layers and name != "architectures":
        kinds = list(dict.fromkeys(map(str, value)))
        if len(kinds) > 1 and isinstance(value[0], str):
            # Both kinds of layer in a model of two layers.
            firsts = [next(item for item in value if str(item) == kind) for kind in kinds]
            return (firsts + firsts)[:LAYERS]
        return list(value)[:LAYERS]
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        for pattern, small in RULES:
            if re.search(pattern, name):
                return min(value, small) if "experts" in name or "top" in name else small
        if TOKEN.search(name) and value >= VOCABULARY:
            return VOCABULARY - 1 - (sum(map(ord, name)) % 20)
    if isinstance(value, list) and TOKEN.search(name) and all(isinstance(item, int) for item in value):
        return [min(item, VOCABULARY - 1) for item in value]
    return value
