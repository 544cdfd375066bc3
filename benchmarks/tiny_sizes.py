"""How small the random models of the tests are, whatever their architecture."""

import dataclasses
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Far from the usual 0.02, so that attention is far from uniform.
    "initializer_range": 0.2,
}
SMALL: dict[str, Any] = {
    # encoder-decoders and their like, whose decoder alone is a language model
    "is_decoder": True,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "init_std": 0.2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    # indexers; of few heads most scores would be 0, and which of equal ones is chosen is undefined
    "index_topk": 8,
    "index_n_heads": 16,
    "index_head_dim": 16,
    # linear attention and state spaces
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    # towers for images and sound
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "projection_intermediate_size": 64,
}
"""Of these, a configuration is given those that it has a field for."""
SLIDING = ["sliding_attention", "full_attention"]
LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
SECTIONS = {"mrope_section": [2, 3, 3]}
LINEAR = ["linear_attention", "full_attention"]
HYBRID = ["linear_attention", "hybrid"]
CHUNKED = {
    "attention_chunk_size": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
}
CHOOSING = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}


def sized(kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    """What a configuration of this class is given to be small: `own`, and of what that leaves open
    `SIZES` and `SMALL`; for configurations within it as well."""
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {**SIZES, **{name: SMALL[name] for name in SMALL.keys() & fields}, **own}
    for name, part in kind.sub_configs.items():
        inside = own.get(name, {})
        if part is AutoConfig and "model_type" in inside:
            part = CONFIG_MAPPING[inside["model_type"]]
        if part is not AutoConfig:
            options[name] = sized(part, inside)
    return {name: value for name, value in options.items() if value is not None}
