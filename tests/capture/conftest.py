"""Tiny random models of many architectures, saved to folders as a user would have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 260
SIZES = {
    "vocab_size": VOCABULARY,
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
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gpt_oss": {
        "sliding_window": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phimoe": {"sliding_window": 8, "num_local_experts": 2},
    "llama4_text": {
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 4,
    },
    "deepseek_v3": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}

TEXT = " ".join(
    f"The {n} birds sang {n * n} songs, and then {n % 7} of them slept." for n in range(60)
)

ModelFolder = Callable[..., Path]


def byte_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Makes the folder of a tiny random model of an architecture, once for each request."""
    made: dict[str, Path] = {}

    def make(model_type: str, *, bos: bool = False, **changes: Any) -> Path:
        name = f"{model_type}-{bos}-{sorted(changes.items())}"
        if name not in made:
            options = {**SIZES, **OWN.get(model_type, {}), **changes}
            config = CONFIG_MAPPING[model_type](**options)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder)
            byte_tokenizer(bos).save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of some 3,000 bytes, of which each is a token."""
    path = tmp_path / "birds.txt"
    path.write_text(TEXT)
    return path
