"""Tiny random models of every family, as the benchmarks and the tests capture them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTextToWaveform,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.tiny_architectures import ARCHITECTURES
from benchmarks.tiny_sizes import sized

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
    kind = CONFIG_MAPPING[model_type]
    own = ARCHITECTURES[model_type]
    if "text_config" in kind.sub_configs:
        own = {**own, "text_config": {**own.get("text_config", {}), **changes}}
    else:
        own = {**own, **changes}
    config = kind(**sized(kind, own))
    torch.manual_seed(0)
    model: Any = checkpoint_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("qk_norm.temp"):  # Zaya's keys times 0 would all be equal
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    byte_tokenizer(bos).save_pretrained(folder)


def checkpoint_class(config: Any) -> Any:
    """What makes the whole model of a configuration, as checkpoints of it hold it: towers for
    images and the like as well, where `model_class` may load its language model alone."""
    for mapping, auto in (
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING, AutoModelForTextToWaveform),
    ):
        if type(config) in mapping:
            return auto
    return model_class(config)


def model_class(config: Any) -> Any:
    """What loads a model of this configuration with a head for language."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    wrapped = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForSeq2SeqLM
