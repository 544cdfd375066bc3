"""Tasks of lm-eval-harness, scored with methods in the loop."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.replay.approximation import Approximation
from retrace.capture import TaskEvaluation, capture, evaluate_tasks
from retrace.traces import PHASES, RetraceError, Trace

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs `pip install 'retrace-attention[lm-eval]'`", allow_module_level=True)

from retrace.capture.checks.trace import examine
from retrace.capture.loop.approximate import Approximator
from retrace.capture.loop.harness_model import HarnessModel

# Packages that lm-eval-harness brings warn of their own future.
pytestmark = pytest.mark.filterwarnings("default")

WORDS = ["lark", "wren", "grebe", "rook", "swift", "owl"]


@pytest.fixture(autouse=True)
def closed_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, and a cache of the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(model_folder: Any) -> str:
    return str(model_folder("llama", eos_token_id=None, initializer_range=0.3))


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task file and its six documents; returns their folder."""

    def write(**config: Any) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        rows = [
            {
                "question": f"Which bird sings in the {word} tree of the {n}th garden?",
                "choices": WORDS[n : n + 3] or WORDS[:3],
                "answer": n % 2,
                "text": word,
            }
            for n, word in enumerate(WORDS)
        ]
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        local = {
            "task": "local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{question}}",
        }
        (folder / "local.yaml").write_text(json.dumps({**local, **config}))  # YAML holds JSON
        return folder

    return write


CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{text}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 9},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
PAGES = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}


def row(found: TaskEvaluation, metric: str, method: str, topk: int) -> dict[str, Any]:
    table = found.table()
    here = (table["metric"] == metric) & (table["method"] == method) & (table["topk"] == topk)
    [only] = table[here].to_dict("records")
    return only


def test_choices_are_those_of_captured_runs(
    task: Callable[..., Path], folder: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tasks": ["local"], "include_path": task(**CHOICES)}
    found = evaluate_tasks(
        ["exact", "window"], [3, 999], pretrained=folder, dtype="float32", **options
    )
    for method in ("exact", "window"):  # with a budget for all keys
        whole = row(found, "acc", method, 999)
        assert (whole["difference"], whole["low"], whole["high"]) == (0, 0, 0)
    exact = capture(folder, **options, dtype="float32", out=tmp_path / "exact.zarr")
    run = capture(
        folder, reference=exact.path, approximate="window", topk=3, out=tmp_path / "run.zarr"
    )
    before, after = (right_answers(trace) for trace in (exact, run))
    few = row(found, "acc", "window", 3)
    assert few["exact"] == before.mean()
    assert few["score"] == after.mean() != before.mean()
    assert few["documents"] == len(WORDS)
    assert few["low"] <= few["difference"] <= few["high"]
    told = found.documents
    told = told[(told["method"] == "window") & (told["topk"] == 3) & (told["metric"] == "acc")]
    assert told.sort_values("document")["value"].tolist() == after.tolist()


def right_answers(trace: Trace) -> np.ndarray[Any, Any]:
    """Whether the likeliest choice of each document is right, by the likelihoods of a trace."""
    likelihoods = []
    for sequence in trace.sequences:
        scored = trace.phase(sequence) == PHASES["continuation"]
        # That of a token is at the position before it.
        likelihoods.append(-trace.nll(sequence)[:-1][scored[1:]].sum())
    right, start = [], 0
    for n in range(len(WORDS)):
        choices = len(WORDS[n : n + 3])
        best = int(np.argmax(likelihoods[start : start + choices]))
        right.append(float(best == n % 2))
        start += choices
    assert start == len(likelihoods)
    return np.array(right)


@pytest.mark.parametrize("spec", ["window", "h2o"])
def test_decoding_is_reading_again(folder: str, spec: str) -> None:
    """Greedy decoding with a method, by reading all anew for each token."""
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Which bird sings in the tree?"
    prompt = tokenizer(text)["input_ids"]
    layers = examine(model, np.array(prompt, np.int32))
    asked = HarnessModel(model, tokenizer)
    request = Instance("generate_until", {}, (text, {"until": ["\n\n"], "max_gen_toks": 8}), 0)
    [exact] = asked.generate_until([request])
    asked.approximator = Approximator(Approximation(parse_spec(spec), 4), layers)
    told: list[tuple[int, int]] = []
    asked.progress = lambda done, total: told.append((done, total))
    [written] = asked.generate_until([request])
    assert written != exact
    assert told == [(0, 1), (1, 1), (1, 1)]
    reader = HarnessModel(model, tokenizer)
    reader.approximator = Approximator(Approximation(parse_spec(spec), 4, len(prompt)), layers)
    tokens = list(prompt)
    for _ in range(8):
        logits = reader._model_call(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in tokens  # where decoding would have ended
    assert written == tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("config", "metric"), [(WRITTEN, "exact_match"), (PAGES, "byte_perplexity")]
)
def test_other_kinds_of_requests(
    task: Callable[..., Path], folder: str, config: dict[str, Any], metric: str
) -> None:
    found = evaluate_tasks(
        ["exact", "window"],
        [3, 999],
        pretrained=folder,
        tasks=["local"],
        include_path=task(**config),
        limit=3,
        dtype="float32",
    )
    whole, few = row(found, metric, "exact", 999), row(found, metric, "window", 3)
    assert whole["score"] == pytest.approx(whole["exact"], rel=1e-5)
    if metric == "byte_perplexity":
        assert few["score"] > 1.01 * few["exact"] or few["score"] < 0.99 * few["exact"]
        assert np.isnan(few["low"])  # of all documents together
        assert few["documents"] == 0
    else:
        assert few["documents"] == 3


def test_points_that_are_there_are_not_run_again(
    task: Callable[..., Path], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores"
    options: dict[str, Any] = {
        "pretrained": folder,
        "tasks": ["local"],
        "include_path": task(**CHOICES),
        "limit": 4,
        "out": out,
    }
    seen: list[str] = []
    first = evaluate_tasks(["window"], [3], **options)
    evaluate_tasks(["window"], [3, 5], **options, progress=lambda what, *_: seen.append(what))
    assert set(seen) == {"Loading model and tasks", "window, 5"}
    monkeypatch.setattr("retrace.capture.commands.evaluate_tasks._Scorer", None)
    again = evaluate_tasks(["window"], [5, 3], **options)
    assert row(again, "acc", "window", 3) == row(first, "acc", "window", 3)
    assert again.table().query("metric == 'acc'")["topk"].tolist() == [3, 5]
    pd.testing.assert_frame_equal(TaskEvaluation.load(out).scores, again.scores)
    assert again.markdown().startswith("| task | metric | method | topk | exact |")
    with pytest.raises(RetraceError, match="holds scores of another limit"):
        evaluate_tasks(["window"], [3], **{**options, "limit": 5})
    (out / "scores.parquet").unlink()  # as though it had ended before
    with pytest.raises(TypeError):  # there is nothing to score with
        evaluate_tasks(["window"], [3], **options)


def test_scores_are_of_the_weights_that_the_model_has(
    task: Callable[..., Path], folder: str, tmp_path: Path
) -> None:
    model, out = tmp_path / "m", tmp_path / "scores"
    shutil.copytree(folder, model)
    options: dict[str, Any] = {
        "pretrained": str(model),
        "tasks": ["local"],
        "include_path": task(**CHOICES),
        "limit": 1,
        "out": out,
    }
    evaluate_tasks(["window"], [3], **options)
    changed = load_file(model / "model.safetensors")
    changed[min(changed)].view(torch.int32)[0, 0] ^= 1
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RetraceError, match="scores of other weights: the model has changed"):
        evaluate_tasks(["window"], [3], **options)  # though nothing is left to run
    facts = json.loads((out / "scores.json").read_text())
    del facts["weights"]
    (out / "scores.json").write_text(json.dumps(facts))
    with pytest.raises(RetraceError, match="does not say which weights"):
        evaluate_tasks(["window"], [5], **options)
    evaluate_tasks(["window"], [3], **options, overwrite=True)


def test_methods_that_learn(
    task: Callable[..., Path], folder: str, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tasks": ["local"], "include_path": task(**CHOICES), "limit": 2}
    with pytest.raises(RetraceError, match="loki learns from a trace"):
        evaluate_tasks(["loki"], [3], pretrained=folder, **options)
    exact = capture(
        folder,
        text=[text_file],
        max_length=50,
        limit=3,
        dtype="float32",
        out=tmp_path / "exact.zarr",
    )
    found = evaluate_tasks(["loki"], [3, 999], exact=exact, **options)
    assert found.facts["calibration"] == [exact.digest(2)]
    assert row(found, "acc", "loki", 999)["difference"] == 0


def test_mistakes(task: Callable[..., Path], folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pretrained": folder, "include_path": task(**CHOICES)}
    with pytest.raises(RetraceError, match="wikitext is no task that lm-eval-harness scores"):
        evaluate_tasks(["window"], [3], tasks=["wikitext"], pretrained=folder)
    with pytest.raises(RetraceError, match="no attention in layer 9"):
        evaluate_tasks(["window"], [3], tasks=["local"], dense_layers=[9], **options)
    task(**{**WRITTEN, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 99}})
    with pytest.raises(RetraceError, match="no room for a prompt"):
        evaluate_tasks(["window"], [3], tasks=["local"], max_length=64, **options)
    task(**{**WRITTEN, "generation_kwargs": {"max_gen_toks": 9, "num_beams": 2}})
    with pytest.raises(RetraceError, match="decode without them"):
        evaluate_tasks(["window"], [3], tasks=["local"], **options)
