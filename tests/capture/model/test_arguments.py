"""Arguments of a model and device maps: read as lm-evaluation-harness reads them, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from retrace.capture import CaptureSettings
from retrace.capture.model.arguments import parse_device_map, parse_model_args
from retrace.capture.model.loading import open_checkpoint
from retrace.traces import RetraceError


@pytest.mark.parametrize(
    "text",
    [
        "",
        "load_in_4bit=True,bnb_4bit_quant_type=nf4",
        "peft=owner/adapter, subfolder=a/b",
        "num_hidden_layers=2,layer_norm_eps=1e-5,tie_word_embeddings=FALSE",
        "variant='8',hidden_act=\"silu\"",
    ],
)
def test_as_the_harness_reads_them(text: str) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    expected = utils.simple_parse_args_string(text)
    assert parse_model_args(text) == {name.strip(): value for name, value in expected.items()}


def test_json_and_mappings() -> None:
    given = {"quantization_config": {"quant_method": "torchao"}, "llm_int8_skip_modules": None}
    expected = {"quantization_config": {"quant_method": "torchao"}}
    assert parse_model_args(json.dumps(given)) == parse_model_args(given) == expected


def refusal(**settings: Any) -> str:
    with pytest.raises(RetraceError) as refused:
        CaptureSettings(pretrained="x", tasks=["wikitext"], **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("load_in_4bit", "not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("peft=a,peft=b", "has peft twice"),
        ("{", "cannot be read as JSON"),
        ("[1]", "not of the form key=value"),
        ("dtype=float16", "--dtype NAME"),
        ("torch_dtype=float16", "--dtype NAME"),
        ("attn_implementation=sdpa", "retrace sets it"),
        ("device_map=auto", "--device-map"),
        ("parallelize=True", "--device-map auto"),
        ("token=hf_x", "hf auth login"),
        ("_name=1", "no argument '_name'"),
        ("load_in_4bit=yes", "load_in_4bit must be true or false, not 'yes'"),
        ("load_in_4bit=True,load_in_8bit=True", "contradict each other"),
        ("bnb_4bit_quant_type=nf4", "is for load_in_4bit=True"),
        ("load_in_8bit=True,bnb_4bit_quant_type=nf4", "is for load_in_4bit=True"),
        ("load_in_4bit=True,bnb_4bit_quant_type=nf3", "one of nf4, fp4, not 'nf3'"),
        ("load_in_4bit=True,bnb_4bit_compute_dtype=int3", "one of float32, bfloat16"),
        ("load_in_4bit=True,llm_int8_threshold=6.0", "is for load_in_8bit=True"),
        ({"load_in_8bit": True, "quantization_config": {}}, "leave one out"),
        ("quantization_config=torchao", "must be an object"),
        ("subfolder=../other", "one of the model's own"),
        ("subfolder=3", "subfolder must be text"),
        ("offload_folder=here", "say --device-map auto too"),
    ],
)
def test_refused(arguments: Any, message: str) -> None:
    assert message in refusal(model_args=arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "blanced"}, "Did you mean balanced"),
        ({"device_map": "{}"}, "name a device for each module"),
        ({"device_map": '{"": -1}'}, "puts '' on -1"),
        ({"device_map": '{"": "meta"}'}, "puts '' on 'meta'"),
        ({"device_map": "{"}, "cannot be read as JSON"),
        ({"device_map": "auto", "device": "cpu"}, "leave one out"),
        ({"device_map": "cpu", "model_args": "max_cpu_memory=1GB"}, "fills devices by itself"),
        ({"revision": "a", "model_args": "revision=b"}, "The revision is a and"),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(**settings)


def test_a_device_map_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text('{"model": "cpu", "lm_head": 0}')
    assert parse_device_map(file) == parse_device_map(str(file)) == {"model": "cpu", "lm_head": 0}


def test_a_revision_among_the_arguments() -> None:
    settings = CaptureSettings(pretrained="x", tasks=["wikitext"], model_args="revision=main")
    assert (settings.revision, settings.model_args) == ("main", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("load_in_4bt=True", r"'load_in_4bt'.* Did you mean load_in_4bit"),
        ("num_hidden_layer=1", r"'num_hidden_layer'.* Did you mean num_hidden_layers"),
        ("to_dict=1", "'to_dict', which neither"),
        ("subfolder=absent", r"absent is no model folder: it has no config\.json"),
        ("peft=/no/where", "There is no model '/no/where'"),
    ],
)
def test_what_no_model_knows(arguments: str, message: str, model_folder: Any) -> None:
    folder = str(model_folder("llama"))
    settings = CaptureSettings(pretrained=folder, tasks=["wikitext"], model_args=arguments)
    with pytest.raises(RetraceError, match=message) as refused:
        open_checkpoint(settings)
    assert "\n" not in str(refused.value)


def test_a_field_of_the_configuration(model_folder: Any) -> None:
    folder = str(model_folder("llama"))
    changed = "num_hidden_layers=1,max_position_embeddings=77"
    settings = CaptureSettings(pretrained=folder, tasks=["wikitext"], model_args=changed)
    checkpoint = open_checkpoint(settings)
    assert checkpoint.max_positions == 77
    assert len(checkpoint.load("auto", "cpu").model.layers) == 1


def test_a_file_that_says_by_itself(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    settings = CaptureSettings(
        pretrained=str(tmp_path / "m.gguf"), tasks=["wikitext"], model_args="load_in_8bit=True"
    )
    with pytest.raises(RetraceError, match=r"load_in_8bit is nothing for a \.gguf file"):
        open_checkpoint(settings)
