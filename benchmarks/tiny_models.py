"""Tiny random models of every family, as the benchmarks and the tests capture them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)
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
SLIDING = ["sliding_attention", "full_attention"]
BART = {
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
INDEXER = {"index_topk": 8, "index_n_heads": 16, "index_head_dim": 16}
"""Of few heads most scores would be 0, and which of equal ones is chosen is not defined."""
MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {"model_type": "clip_vision_model", **PATCHES}
SECTIONS = {"mrope_section": [2, 3, 3]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {**EXPERTS, "num_dense_layers": 1, "sliding_window": 8, "layer_types": SLIDING},
    "apertus": {},
    "arcee": {},
    "axk1": {**LATENT, **ROUTED, "n_shared_experts": 1},
    "axk2": {**LATENT, **ROUTED, **INDEXER, "n_shared_experts": 1},
    "bamba": {
        **MAMBA,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
    },
    "bart": BART,
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"sliding_window": 8, "layer_types": SLIDING},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "deepseek_v2": {**LATENT, **ROUTED},
    "deepseek_v3": {**LATENT, **ROUTED},
    "deepseek_v32": {**LATENT, **ROUTED, **INDEXER},
    "deepseek_v4": {**LATENT, **ROUTED, **INDEXER, "n_shared_experts": 1},
    "diffllama": {},
    "doge": {"keep_window_size": 8},
    "dots1": {**ROUTED, "n_shared_experts": 1, "sliding_window": 8, "layer_types": SLIDING},
    "dots3_note_text": {
        **LATENT,
        **ROUTED,
        **INDEXER,
        "n_shared_experts": 1,
        "layer_types": ["indexed_attention"] * 2,
    },
    "ernie4_5": {},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": {"sliding_window": 8, "layer_types": SLIDING},
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {**MAMBA, "mamba_d_head": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", *SLIDING],
    },
    "gemma3n_text": {
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": SLIDING * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 260,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": SLIDING * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 260,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 32,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {**ROUTED},
    "glm4_moe_lite": {**LATENT, **ROUTED},
    "glm5_next": {
        "text_config": {
            "model_type": "glm5_next_text",
            **LATENT,
            **ROUTED,
            **INDEXER,
            "head_dim": None,
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "n_shared_experts": 1,
            "num_hidden_layers": 4,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    "glm_moe_dsa": {**LATENT, **ROUTED, **INDEXER},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {
        "sliding_window": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": SLIDING,
    },
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "granite": {"attention_multiplier": 0.0625},
    "granitemoe": {**EXPERTS, "attention_multiplier": 0.0625},
    "granitemoehybrid": {
        **EXPERTS,
        **MAMBA,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 32,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "hy_v4": {
        **LATENT,
        **ROUTED,
        **INDEXER,
        "n_shared_experts": 1,
        "indexer_types": ["full", "shared"],
    },
    "inkling_text": {},
    "jamba": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
    },
    "llama": {},
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": CLIP},
    "llama4_text": {
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 4,
    },
    "longcat_flash": {
        **LATENT,
        **ROUTED,
        "num_layers": 1,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 1,
    },
    "mamba": {"state_size": 4},
    "mbart": BART,
    "minicpm3": {**LATENT, "v_head_dim": 16},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "minimax_m3_vl_text": {
        **EXPERTS,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "rotary_dim": 8,
    },
    "ministral": {"sliding_window": 8, "layer_types": SLIDING},
    "mistral": {"sliding_window": 8},
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": 8},
        "vision_config": {"model_type": "pixtral", **PATCHES},
    },
    "mistral4": {**LATENT, **ROUTED},
    "mistral_large4": {
        "text_config": {
            "model_type": "mistral_large4_text",
            **LATENT,
            **ROUTED,
            **INDEXER,
            "n_shared_experts": 1,
            "num_hidden_layers": 4,
        },
        "vision_config": {"model_type": "pixtral", **PATCHES},
    },
    "mixtral": {**EXPERTS},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "layer_types": SLIDING},
    "olmoe": {**EXPERTS},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64, "init_std": 0.2},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8, "num_local_experts": 2},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **SECTIONS}},
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
    },
    "qwen2_moe": {
        **EXPERTS,
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {},
    "qwen3_5_text": {
        **LINEAR,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "qwen3_moe": {**EXPERTS},
    "qwen3_next": {
        **EXPERTS,
        **LINEAR,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "qwen4_exp_text": {
        **EXPERTS,
        **LINEAR,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **SECTIONS}},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "attention_window_size": 8,
        "lru_width": 64,
        "w_init_variance_scale": 1.0,
    },
    "sarvam_mla": {**LATENT, **ROUTED, "n_shared_experts": 1},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "smolvlm": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "smolvlm_vision", **PATCHES},
    },
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "xglm": {"d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "init_std": 0.2},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": LATENT,
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
        "use_mem_rope": True,
        "adapter_rank": 8,
    },
}
"""What the configuration of each family differs in from `SIZES`; None leaves one of these out.
Language models inside a vision-language model have one of their own: `text_config`."""

TEXT = " ".join(
    f"The {n} birds sang {n * n} songs, and then {n % 7} of them slept." for n in range(60)
)


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Three special tokens and one token per byte; with `bos`, each text begins with <s>."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_tiny_model(model_type: str, folder: Path, *, bos: bool = False, **changes: Any) -> None:
    """Save a tiny random model of an architecture and its tokenizer, as a user would have them."""
    own = ARCHITECTURES.get(model_type, {})
    text = {**SIZES, **own.get("text_config", own), **changes}
    options = {k: v for k, v in text.items() if v is not None}
    if "text_config" in own:
        options = {**own, "text_config": options}
    config = CONFIG_MAPPING[model_type](**options)
    torch.manual_seed(0)
    model: Any = model_class(config).from_config(config)
    model.save_pretrained(folder)
    byte_tokenizer(bos).save_pretrained(folder)


def model_class(config: Any) -> Any:
    """What loads a model of this configuration with a head for language."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    wrapped = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForSeq2SeqLM
