"""Tiny configurations of any transformers class, by rules on the names of fields; nothing about single models."""

import re
from typing import Any, NamedTuple


class Size(NamedTuple):
    """How tiny. What does not fit one class may fit another: heads that share keys, both kinds of layer in few."""

    hidden: int = 32
    heads: int = 4
    key_heads: int = 2
    layers: int = 2
    sections: bool = False  # rotary sections of images, which some classes have defaults for outside the configuration

    @property
    def head(self) -> int:
        return self.hidden // self.heads


SIZES = (
    Size(),
    Size(key_heads=4),
    Size(sections=True),
    Size(hidden=64, key_heads=4, layers=4),
    Size(hidden=128, layers=6),
)
VOCABULARY, POSITIONS, IMAGE, PATCH = 96, 128, 32, 8


def _named(*names: str) -> str:
    return "^(" + "|".join(names) + ")$"


# The first match wins; a field that matches nothing keeps its default.
RULES = (
    (r"(^|_)(unpadded_)?vocab_size$|^vocab_size_\w+$|^n_vocab$|^n_token$", lambda s: VOCABULARY),
    (r"(key_value|kv)_heads$|num_kv$|n_head_kv$|^num_key_value_groups$|multi_query_group_num", lambda s: s.key_heads),
    (r"^qk_head_dim$|^mamba_(d_head|head_dim|headdim)$", lambda s: 2 * s.head),
    (r"head_dim$|^attention_head_size$|^d_kv$|^d_head$|^kv_channels$|^head_size$|^rotary_dim$", lambda s: s.head),
    (r"heads?$|^n_head$", lambda s: s.heads),
    (r"n_?groups$|^n_group$|^topk_group$|^num_expert_group$|^num_limited_groups$", lambda s: 1),
    (r"^(n|num|moe_num)_(shared|share)_experts?$", lambda s: 1),
    (r"shared_layers$", lambda s: 0),
    (r"layers?$|^depth$|^num_blocks$", lambda s: s.layers),
    (
        r"(intermediate|ffn_hidden|ffn|feed_forward|mlp_hidden|expert\w*)_(size|dim)$|(^|_)(ffn|mlp|ff|inner)_dim$|"
        r"^d_ff$|^n_inner$|^d_inner$|^mamba_d_ssm$",
        lambda s: 2 * s.hidden,
    ),
    (r"experts_per_tok(en)?$|top_?k(_experts)?$|^num_selected_experts$|^moe_k$", lambda s: 2),
    (r"experts$", lambda s: 4),
    (r"lora_rank$", lambda s: 16),
    (r"^(ssm_)?state_size$|^mamba_d_state$", lambda s: 8),
    (
        r"(max_position_embeddings|n_positions|max_seq_len|seq_length|n_ctx|source_positions|target_positions|"
        r"max_sequence_length|max_position|tokens_per_sample|context_length)$",
        lambda s: POSITIONS,
    ),
    (r"^(image|img|input|crop)_size$", lambda s: IMAGE),
    (r"^patch_size$", lambda s: PATCH),
    (r"(sliding|attention)_window$", lambda s: 16),
    (
        _named(
            r"(\w+_)?hidden_size", "d_model", "n_embd", r"(\w+_)?embed_dim", "hidden_dim", "dim", "embedding_dim",
            r"(\w+_)?proj_dim", "embedding_size", "emb_dim", "d_embed", "model_dim", "width", "lru_width",
            "projection_dim", "output_dim", "input_dim", "embed_size", "token_dim", "vision_output_dim",
        ),
        lambda s: s.hidden,
    ),
)  # fmt: skip
TOKEN = re.compile(r"(_token_id|_token_index|_index|_id|_token_ids|_tokens)$")
NEEDED = _named(r"(\w+_)?experts?(_per_tok)?", "head_dim", "vocab_size", "moe_intermediate_size")
OWN = ("transformers_version", "model_type", "_name_or_path", "architectures")


def shrink(config: Any, size: Size = SIZES[0]) -> Any:
    """A tiny configuration of the same class."""
    tiny = type(config)(**_tiny_values(config.to_dict(), size))
    if tiny.is_encoder_decoder and getattr(tiny, "decoder_start_token_id", None) is None:
        tiny.decoder_start_token_id = 1
    return tiny


def _tiny_values(values: dict[str, Any], size: Size) -> dict[str, Any]:
    counts = (values.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"))
    layers = next((count for count in counts if isinstance(count, int)), None)
    tiny = {name: _tiny(name, value, layers, size) for name, value in values.items() if name not in OWN}
    if values.get("attn_layer_period"):
        tiny["attn_layer_period"], tiny["attn_layer_offset"] = 2, 1
    if "expand" in values and isinstance(values.get("num_heads"), int) and "head_dim" in values:
        tiny["head_dim"] = int(values["expand"] * size.hidden) // size.heads
    return tiny


def _tiny(name: str, value: Any, layers: int | None, size: Size) -> Any:
    if isinstance(value, dict):
        return _tiny_dictionary(name, value, layers, size)
    if isinstance(value, (list, tuple)):
        return _tiny_list(name, value, layers, size)
    if isinstance(value, bool) or not (isinstance(value, int) or (value is None and re.match(NEEDED, name))):
        return value
    for pattern, small in RULES:
        if re.search(pattern, name):
            return min(value or 4, small(size)) if "expert" in name else small(size)
    if value is not None and TOKEN.search(name) and value >= VOCABULARY:
        return VOCABULARY - 1 - sum(map(ord, name)) % 20
    return value


def _tiny_dictionary(name: str, value: dict, layers: int | None, size: Size) -> dict:
    if "model_type" in value or (name.endswith("_config") and name != "quantization_config"):
        inner = _tiny_values(value, size) if all(isinstance(key, str) for key in value) else dict(value)
        if "model_type" in value:
            inner["model_type"] = value["model_type"]
        value = inner
    if value and all(str(key).isdigit() for key in value):
        value = {key: item for key, item in value.items() if int(key) < size.layers}
    for nested in (value, *(item for item in value.values() if isinstance(item, dict))):
        if nested.get("mrope_section") or (size.sections and "rope_type" in nested):
            half = int(size.head * nested.get("partial_rotary_factor", 1.0)) // 2
            nested["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return value


def _tiny_list(name: str, value: Any, layers: int | None, size: Size) -> Any:
    if layers and len(value) == layers and value:
        kinds = list(dict.fromkeys(map(str, value)))
        if len(kinds) > 1 and isinstance(value[0], str):
            # Every kind of layer once, where there is room.
            firsts = [next(item for item in value if str(item) == kind) for kind in kinds]
            return (firsts * size.layers)[: size.layers]
        return list(value)[: size.layers]
    if TOKEN.search(name) and all(isinstance(item, int) for item in value):
        return [min(item, VOCABULARY - 1) for item in value]
    return value
