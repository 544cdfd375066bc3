"""How small a random model of each architecture is made that has configurations within its own."""

from typing import Any

from benchmarks.tiny_sizes import CHOOSING, CHUNKED, LATENT, LINEAR, SECTIONS, SLIDING

COMPOSITES: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "text_config": {**LATENT, "layer_types": ["indexed_attention"] * 2},
        "vision_config": {
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
            "mlp_layer_types": ["dense"] * 2,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 3},
        "vq_config": {"base_channels": 32, "codebook_size": 32, "num_attention_heads": 1},
    },
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {
        "text_config": {"sliding_window": 8, "query_pre_attn_scalar": 32, "layer_types": SLIDING},
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "gemma4": {
        "text_config": {
            "sliding_window": 8,
            "layer_types": SLIDING,
            "vocab_size_per_layer_input": 260,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 32,
            "num_experts": None,
        }
    },
    "gemma4_assistant": {
        "backbone_hidden_size": 64,
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_experts": None,
        },
    },
    "gemma4_unified": {
        "text_config": {"sliding_window": 8, "layer_types": SLIDING, "global_head_dim": 32},
        "vision_config": {"mm_embed_dim": 64, "output_proj_dims": 64},
    },
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 64,
        "text_config": {"model_type": "gemma4_unified_text"},
    },
    "glm5_next": {
        "text_config": {
            "model_type": "glm5_next_text",
            **LATENT,
            "head_dim": None,
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "num_hidden_layers": 4,
        }
    },
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "llama4": {"text_config": CHUNKED},
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": 8},
        "vision_config": {"model_type": "pixtral"},
    },
    "mistral_large4": {
        "text_config": {"model_type": "mistral_large4_text", **LATENT, "num_hidden_layers": 4},
        "vision_config": {"model_type": "pixtral"},
    },
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "musicgen": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}},
    "musicgen_melody": {
        "text_encoder": {"model_type": "t5"},
        "audio_encoder": {"model_type": "encodec"},
    },
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 64,
        }
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **SECTIONS}}
    },
    "qwen3_5": {"text_config": {"layer_types": LINEAR}},
    "qwen3_5_moe": {"text_config": {"layer_types": LINEAR}},
    "qwen3_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **SECTIONS}},
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "qwen4_exp": {"text_config": CHOOSING},
    "smolvlm": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "smolvlm_vision"},
    },
}
"""What their configurations differ in from what `sized` gives, each part under its name: a language
model inside a vision-language model is its `text_config`."""
