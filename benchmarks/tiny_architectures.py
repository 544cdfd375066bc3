"""The architectures that are tried, and how small a random model of each is made."""

from typing import Any

from benchmarks.tiny_composites import COMPOSITES
from benchmarks.tiny_sizes import CHOOSING, CHUNKED, HYBRID, LATENT, LINEAR, SECTIONS, SLIDING

TRANSFORMERS = "5.24.0"
"""The version whose causal language models `ARCHITECTURES` and `NOT_TRIED` name one by one."""
NOT_TRIED = {
    "gemma3n": "Its tower for images is a model of the package timm, which the tests do without. "
    "Its language model is gemma3n_text.",
}
"""Causal language models that are not tried, each with its reason."""
PLAIN = """
apertus apertus1p5_text arcee aria_text bart bert bert-generation big_bird bigbird_pegasus
biogpt bitnet blenderbot blenderbot-small camembert data2vec-text diffllama electra ernie
ernie4_5 exaone falcon_mamba flex_olmo gemma git glm glm4 glm4_moe gpt-sw3 gpt_neox_japanese
granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax inkling_text
internlm3 iquestcoder jais2 jetmoe llama mbart megatron-bert minimax_m2 ministral3 mixtral
mllama mvp nanochat nemotron olmo olmo2 olmoe pegasus persimmon phi plbart qwen3 qwen3_moe
rembert roberta roberta-prelayernorm roformer rwkv sarvam_moe seed_oss solar_open stablelm trocr
whisper xlm xlm-roberta xlm-roberta-xl xlstm
""".split()
"""Those that are small by `sized` alone."""
WINDOWED = """
beam cohere2 cohere2_moe cwm dory dots1 exaone4 exaone_moe flint granite_swa granitemoe_swa
kolibri1 laguna mellum ministral modernbert-decoder olmo3
""".split()
"""Those of one layer with a window and one without."""
LATENT_ATTENTION = """
axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite glm_moe_dsa mistral4
sarvam_mla youtu
""".split()
"""Those of latent attention."""
KEYS_SHARED: dict[str, Any] = {
    "sliding_window": 8,
    "num_hidden_layers": 4,
    "layer_types": SLIDING * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 8,
}
"""Of models whose upper layers attend to keys of lower ones."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in PLAIN},
    **{model_type: {"sliding_window": 8, "layer_types": SLIDING} for model_type in WINDOWED},
    **{model_type: LATENT for model_type in LATENT_ATTENTION},
    **COMPOSITES,
    "afmoe": {"num_dense_layers": 1, "sliding_window": 8, "layer_types": SLIDING},
    "bailing_hybrid": {**LATENT, "head_dim": None, "layer_types": LINEAR},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "bloom": {"n_head": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "sliding_window": 8,
        "layer_types": SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, **SECTIONS},
            "full_attention": None,
        },
    },
    "cpmant": {"dim_head": 16, "dim_ff": 64},
    "ctrl": {"dff": 64},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "doge": {"keep_window_size": 8},
    "dots3_note_text": {**LATENT, "layer_types": ["indexed_attention"] * 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", *SLIDING],
    },
    "gemma3n_text": {
        **KEYS_SHARED,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        **KEYS_SHARED,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {"sliding_window": 8, "global_head_dim": 32, "layer_types": SLIDING},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {"n_positions": 512},
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
    "gptj": {"rotary_dim": 8},
    "granite": {"attention_multiplier": 0.0625},
    "granitemoe": {"attention_multiplier": 0.0625},
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 32,
    },
    "hy_v4": {**LATENT, "indexer_types": ["full", "shared"]},
    "inkling2_loop_text": {
        "unpadded_vocab_size": 260,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
        "loop_gate_rank": 8,
        "n_layers_per_attn_res_block": 1,
        "num_hidden_layers": 4,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    "inkling2_text": {
        "unpadded_vocab_size": 260,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
        "n_layers_per_attn_res_block": 1,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**LATENT, "head_dim": None, "layer_types": LINEAR},
    "lara_mini": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", *SLIDING],
        "sliding_window": 8,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
    },
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", *SLIDING], "sliding_window": 8},
    "llama4_text": CHUNKED,
    "longcat_flash": {
        **LATENT,
        "num_layers": 1,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 1,
    },
    "mamba": {"state_size": 4},
    "mamba2": {"head_dim": 32, "num_heads": 4, "n_groups": 1, "state_size": 8},
    "marian": {"scale_embedding": True},
    "mimo_v2_flash": {"sliding_window": 8, "v_head_dim": 12, "layer_types": SLIDING},
    "minicpm3": {**LATENT, "v_head_dim": 16},
    "minimax": {"layer_types": LINEAR},
    "minimax_m3_vl_text": {
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "rotary_dim": 8,
    },
    "mistral": {"sliding_window": 8},
    "moshi": {"audio_vocab_size": 32},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": None,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {"layer_types": LINEAR},
    "openai-gpt": {"n_positions": 512},
    "opt": {"word_embed_proj_dim": 64},
    "phi3": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8, "num_local_experts": 2},
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "qwen4_exp_text": CHOOSING,
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "attention_window_size": 8,
        "lru_width": 64,
        "w_init_variance_scale": 1.0,
    },
    "reformer": {"attention_head_size": 16, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 260, "shape_vocab_size": 260},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": 8},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "vaultgemma": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "layer_types": SLIDING,
    },
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4},
    "xlnet": {"max_position_embeddings": None, "d_inner": 64, "d_head": 16},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": HYBRID * 2,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
        "use_mem_rope": True,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What the configuration of each architecture differs in from what `sized` gives; None leaves
something out."""
