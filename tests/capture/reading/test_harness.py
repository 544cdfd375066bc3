"""Tasks of lm-eval-harness: what it would have a model read becomes the trace's sequences."""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrace.capture import CaptureSettings, capture
from retrace.capture.reading.tasks import read_sequences
from retrace.capture.reading.windows import SequenceSet, WindowCutter
from retrace.traces import PHASES, RetraceError

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs `pip install 'retrace-attention[lm-eval]'`", allow_module_level=True)

from retrace.capture.reading.harness import Harness, encode_pair, rolling_windows

# Packages that lm-eval-harness brings warn of their own future.
pytestmark = pytest.mark.filterwarnings("default")


class Characters:
    """One token per character; with `bos`, a caret before each text."""

    def __init__(self, bos: bool = False) -> None:
        self.bos_token = "^" if bos else None
        self.bos_token_id = ord("^") if bos else None
        self.eos_token = "$"
        self.eos_token_id: int | None = ord("$")

    def save_pretrained(self, folder: str) -> None:
        """Nothing that these tasks would need."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        begin = "^" if self.bos_token and add_special_tokens else ""
        return {"input_ids": [ord(character) for character in begin + text]}


@pytest.fixture(autouse=True)
def closed_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, and a cache of the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task file and its data; returns their folder."""

    def write(rows: list[dict[str, Any]], **config: Any) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        split = config.get("test_split") or "validation"
        local = {
            "task": "local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data), "train": str(data)}},
        }
        (folder / "local.yaml").write_text(json.dumps({**local, **config}))  # YAML holds JSON
        return folder

    return write


def read(folder: Path, max_length: int = 1000, bos: bool = False, **settings: Any) -> SequenceSet:
    """The sequences of the local task."""
    asked = CaptureSettings(pretrained="x", tasks=["local"], include_path=folder, **settings)
    cut = WindowCutter(Characters(bos), max_length - asked.generate, asked.limit)
    (found,) = read_sequences(asked, cut, Harness(asked))
    return found


def texts(found: SequenceSet) -> list[str]:
    """The sequences, a bar before scored text."""
    assert found.scored is not None
    split = [len(t) - n for t, n in zip(found.sequences, found.scored, strict=True)]
    whole = ["".join(map(chr, tokens)) for tokens in found.sequences]
    return [text[:at] + "|" + text[at:] for text, at in zip(whole, split, strict=True)]


def choices(number: int) -> dict[str, Any]:
    return {"question": f"Bird {number}?", "choices": ["lark", "lark", "wren"], "answer": 0}


CHOICES = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("a b", " c", ("a b", " c")),
        ("a  ", "c", ("a", "  c")),
        ("", "c", ("$", "c")),
        ("", "$c", ("$", "c")),
    ],
)
def test_pairs(context: str, continuation: str, expected: tuple[str, str]) -> None:
    pair = encode_pair(Characters(), context, continuation)
    assert tuple("".join(map(chr, tokens)) for tokens in pair) == expected


def test_pairs_begin_once() -> None:
    for context in ("ab", "^ab"):
        assert encode_pair(Characters(bos=True), context, "c")[0] == [ord(c) for c in "^ab"]


def test_multiple_choice(task: Callable[..., Path]) -> None:
    folder = task([choices(n) for n in range(4)], **CHOICES)
    found = read(folder, limit=2)
    # Two documents; a choice that is there twice is one sequence.
    assert texts(found) == [
        "Bird 0?| lark",
        "Bird 0?| wren",
        "Bird 1?| lark",
        "Bird 1?| wren",
    ]
    assert (found.task, found.source, found.num_fewshot) == ("local", "json", 0)
    assert texts(read(folder, limit=1, max_length=9))[0] == "d 0?| lark"  # cut from the left


def test_few_shot(task: Callable[..., Path]) -> None:
    folder = task([choices(n) for n in range(4)], **CHOICES, fewshot_split="test")
    found = read(folder, limit=1, num_fewshot=2)
    assert found.num_fewshot == 2
    for text in texts(found):
        context, scored = text.split("|")
        assert context.count("Bird") == 3 and context.count(" lark\n\n") == 2
        assert context.endswith("Bird 0?") and scored in (" lark", " wren")


def test_hellaswag_itself(task: Callable[..., Path]) -> None:
    row = {
        "ind": 1,
        "activity_label": "Baking",
        "ctx_a": "A man mixes dough. [title] He",
        "ctx_b": "then",
        "ctx": "",
        "endings": ["bakes  it.", "eats [step] it.", "sleeps.", "sings."],
        "source_id": "a",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    }
    found = read(task([row], include=str(harness_file("hellaswag/hellaswag.yaml"))))
    assert texts(found) == [
        f"Baking: A man mixes dough.. He Then| {ending}"
        for ending in ("bakes it.", "eats it.", "sleeps.", "sings.")
    ]


def harness_file(name: str) -> Path:
    """A file in the folder of tasks that lm-eval-harness brings."""
    found = importlib.util.find_spec("lm_eval")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0], "tasks", name)


ROLLING = {
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{page}}",
}


def test_rolling(task: Callable[..., Path]) -> None:
    folder = task([{"page": "abcdefghij"}, {"page": "klm"}, {"page": "no"}], **ROLLING)
    # The limit is of documents: two of them, which make four windows.
    expected = ["$|abcd", "d|efgh", "fgh|ij", "$|klm"]
    assert texts(read(folder, limit=2, max_length=5)) == expected
    # As there, a tokenizer that puts BOS before each text has two of them.
    expected = ["^|^abc", "c|defg", "fg|hij"]
    assert texts(read(folder, limit=1, max_length=5, bos=True)) == expected
    # To be continued: prompts, which nothing of is scored.
    assert texts(read(folder, limit=2, max_length=15, generate=4)) == ["$abcdefghij|", "$klm|"]


def test_a_document_that_nothing_begins() -> None:
    tokenizer = Characters()
    tokenizer.eos_token_id = None
    with pytest.raises(RetraceError, match="no token that begins or ends a text"):
        list(rolling_windows(WindowCutter(tokenizer, 5, None), "abc"))


@pytest.mark.parametrize("bos", [False, True])
def test_rolling_as_the_harness_reads(
    bos: bool, task: Callable[..., Path], model_folder: Any, tmp_path: Path
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("llama", bos=bos)
    pages = ["hello", "abcdefghijklmnopqrstuvwxyz"]
    trace = capture(
        str(folder),
        tasks=["local"],
        include_path=task([{"page": page} for page in pages], **ROLLING),
        max_length=16,
        out=tmp_path / "t",
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    harness = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=15,
        batch_size=1,
    )
    asked = [Instance("loglikelihood_rolling", {}, (page,), 0) for page in pages]
    expected = harness.loglikelihood_rolling(asked, disable_tqdm=True)
    found = [
        -float(trace.nll(s)[:-1][trace.phase(s)[1:] == PHASES["continuation"]].sum())
        for s in trace.sequences
    ]
    assert found[0] == pytest.approx(expected[0], abs=1e-3)
    assert sum(found[1:]) == pytest.approx(expected[1], abs=1e-3)


PROMPTS = {
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "Q: {{question}} A:",
    "doc_to_target": "{{answer}}",
}


def test_prompts(task: Callable[..., Path]) -> None:
    folder = task([{"question": "why?", "answer": "so"}], **PROMPTS)
    assert texts(read(folder)) == ["Q: why? A:|"]
    assert texts(read(folder, max_length=10, generate=4)) == ["hy? A:|"]


def test_traces(task: Callable[..., Path], model_folder: Any, tmp_path: Path) -> None:
    model = str(model_folder("llama", eos_token_id=None))
    folder = task([choices(n) for n in range(2)], **CHOICES)
    options: dict[str, Any] = {"tasks": ["local"], "include_path": folder}
    trace = capture(model, **options, batch_size=3, out=tmp_path / "choices")
    assert trace.attributes["task"] == [
        {"task": "local", "source": "json", "sequences": 4, "num_fewshot": 0}
    ]
    context, scored = PHASES["context"], PHASES["continuation"]
    assert trace.phase(0).tolist() == [context] * 7 + [scored] * 5
    with pytest.raises(RetraceError, match="nothing to generate"):
        capture(model, **options, generate=4, out=tmp_path / "none")
    task([{"question": "why?", "answer": "so"}], **PROMPTS)
    trace = capture(model, **options, generate=4, out=tmp_path / "prompts")
    assert trace.phase(0).tolist() == [context] * 10 + [PHASES["generated"]] * 4


def test_a_task_that_is_not_there(task: Callable[..., Path]) -> None:
    folder = task([choices(0)], **CHOICES)
    settings = CaptureSettings(pretrained="x", tasks=["helaswag"], include_path=folder)
    with pytest.raises(RetraceError, match=r"Did you mean hellaswag.*`lm-eval ls tasks`"):
        Harness(settings)


def test_hub_data_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # No variable says so, only a proxy that nothing listens at, as behind a cut connection.
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    import lm_eval.tasks

    # Of the harness's own task files this one's alone are read: all take ten seconds.
    folder = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    settings = CaptureSettings(pretrained="x", tasks=["hellaswag"], include_path=folder)
    harness = Harness(settings)
    started = time.monotonic()
    with pytest.raises(RetraceError, match=r"Rowan/hellaswag.*--include-path") as refusal:
        read_sequences(settings, WindowCutter(Characters(), 10, None), harness)
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - started < 10


def test_data_that_is_not_there(task: Callable[..., Path]) -> None:
    folder = task([choices(0)], **CHOICES)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(RetraceError, match="The task local cannot be read: "):
        read(folder)
