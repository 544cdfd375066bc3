"""Where the documents of long-context tasks stand in their prompts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_models import byte_tokenizer
from retrace.capture import CaptureSettings
from retrace.capture.reading.evidence import parts_of_document
from retrace.capture.reading.tasks import read_sequences
from retrace.capture.reading.windows import SequenceSet, WindowCutter
from retrace.traces import RetraceError

NEEDLES = (
    "The grass is green.\nOne of the special magic numbers for tall-tree is: 1234567.\n"
    "One of the special magic numbers for low-tree is: 7654321.\n"
    "What is the special magic number for tall-tree mentioned in the provided text?"
)


def parts(document: dict[str, Any], text: str) -> dict[str, list[str]]:
    """What is found of a document, as text."""
    found = parts_of_document(document, text)
    return {name: [text[p.start : p.stop] for p in places] for name, places in found.items()}


def test_needles_of_ruler() -> None:
    document = {"input": NEEDLES, "outputs": ["1234567"]}
    assert parts(document, f"An example: {NEEDLES} The number is") == {
        "evidence": ["One of the special magic numbers for tall-tree is: 1234567."],
        "question": [NEEDLES.splitlines()[-1]],
    }


def test_answers() -> None:
    document = {
        "context": "A wren. Wrens. The wren!",
        "answers": ["wren", "or"],
        "question": "Who?",
    }
    assert parts(document, f"Who? {document['context']} Who?") == {
        "evidence": ["wren", "wren"],
        "question": ["Who?"],
    }
    found = parts_of_document(document, f"Who? {document['context']} Who?")
    assert found["question"][0].start > found["evidence"][-1].stop
    document = {"input": " John is home.\n", "question": "Where?", "target": "home"}
    # Of a solved example there is nothing.
    text = "John is home. Where? home\n\nJohn is home. Where?"
    assert parts_of_document(document, text)["evidence"] == [range(35, 39)]


@pytest.mark.parametrize(
    "document",
    [
        {},
        "text",
        {"context": "A wren."},
        {"context": "A wren.", "answers": []},
        {"context": "A wren.", "answers": ["a"]},
        {"context": "A wren sings.", "answers": ["wren"]},
        {"context": ["A wren."], "answers": "wren"},
        {"context": "", "answers": "wren"},
    ],
)
def test_documents_that_tell_nothing(document: Any) -> None:
    assert parts_of_document(document, "Read: A wren.") == {}


LM_EVAL = importlib.util.find_spec("lm_eval")
needs_harness = pytest.mark.skipif(LM_EVAL is None, reason="needs the lm-eval extra")


@pytest.fixture(autouse=True)
def closed_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, and a cache of the test's own."""
    if LM_EVAL is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def own_task(folder: Path, file: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A task of lm-eval-harness over rows of one's own, as a folder of task files."""
    assert LM_EVAL is not None and LM_EVAL.submodule_search_locations
    tasks = Path(LM_EVAL.submodule_search_locations[0], "tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = changes.pop("split", "test")
    config = {
        "include": str(tasks / file),
        "task": "local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
        **changes,
    }
    (folder / "local.yaml").write_text(json.dumps(config))
    return folder


def read(most: int = 5000, template: str | None = None, **settings: Any) -> SequenceSet:
    """The sequences of a task, by a tokenizer of one token per byte."""
    from retrace.capture.reading.harness import Harness

    asked = CaptureSettings(pretrained="x", **settings)
    tokenizer = byte_tokenizer(True)
    tokenizer.chat_template = template
    cut = WindowCutter(tokenizer, most - asked.generate, asked.limit)
    (found,) = read_sequences(asked, cut, Harness(asked))
    return found


BABI = {
    "input": "Some text. Mary went to the office. More text.",
    "question": "Where is Mary?",
    "target": "office",
}


@needs_harness
@pytest.mark.filterwarnings("default")
def test_babilong_of_local_data(tmp_path: Path, marked: Any) -> None:
    file = "babilong/babilong_qa1.yaml"
    folder = own_task(tmp_path, file, [BABI], custom_dataset=None, split="qa1")
    found = read(tasks=["local"], include_path=folder)
    assert marked(found) == {"evidence": ["office"], "question": ["Where is Mary?"]}
    assert found.num_fewshot == 2
    # Cut from the left, as the harness does: marks move along, and go with what is cut off.
    short = read(tasks=["local"], include_path=folder, max_length=70, most=70)
    assert marked(short) == marked(found)
    shorter = read(tasks=["local"], include_path=folder, max_length=30, most=30)
    assert marked(shorter) == {"question": ["Where is Mary?"]}


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or "
    "add_generation_prompt %}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@needs_harness
@pytest.mark.filterwarnings("default")
def test_tasks_in_a_chat(tmp_path: Path, marked: Any) -> None:
    file = "babilong/babilong_qa1.yaml"
    folder = own_task(tmp_path, file, [BABI], custom_dataset=None, split="qa1")
    options: dict[str, Any] = {"tasks": ["local"], "include_path": folder}
    options |= {"apply_chat_template": True, "system_instruction": "Hm.", "template": TEMPLATE}
    found = read(**options)
    text = byte_tokenizer().decode(found.sequences[0])
    assert text.startswith("<s><system>Hm.\n\nI will give you context")
    assert text.count("<user>") == 3 and text.endswith("Where is Mary?</><assistant>")
    assert marked(found) == {"evidence": ["office"], "question": ["Where is Mary?"]}
    text = byte_tokenizer().decode(read(**options, fewshot_as_multiturn=False).sequences[0])
    assert text.count("<user>") == 1
    with pytest.raises(RetraceError, match="no chat template"):
        read(**{**options, "template": None})


@needs_harness
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jieba", "fuzzywuzzy", "rouge")),
    reason="needs `pip install 'lm-eval[longbench]'`",
)
def test_longbench_of_local_data(tmp_path: Path, marked: Any) -> None:
    row = {"context": "Ann lives in Rome. Bob in Oslo.", "question": "Where?", "answers": ["Rome"]}
    found = read(tasks=["local"], include_path=own_task(tmp_path, "longbench/hotpotqa.yaml", [row]))
    assert marked(found) == {"evidence": ["Rome"], "question": ["Where?"]}


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_package_that_a_task_lacks(tmp_path: Path) -> None:
    (tmp_path / "absent.py").write_text("import a_package_that_is_not_there\n\ndef get(): ...\n")
    changes = {"process_results": None, "test_split": "test"}
    folder = own_task(tmp_path, "babilong/babilong_qa1.yaml", [BABI], **changes)
    text = (folder / "local.yaml").read_text()
    (folder / "local.yaml").write_text(text[:-1] + ', "custom_dataset": !function absent.get}')
    with pytest.raises(RetraceError, match=r"a_package.*retrace-attention\[ruler\]") as refusal:
        read(tasks=["local"], include_path=folder)
    assert "\n" not in str(refusal.value)


needs_ruler = pytest.mark.skipif(
    LM_EVAL is None or not all(importlib.util.find_spec(n) for n in ("wonderwords", "nltk")),
    reason="needs `pip install 'retrace-attention[ruler]'`",
)


def ruler_files(monkeypatch: pytest.MonkeyPatch) -> Path:
    """RULER's task files, of which 500 documents would else be made; all files of the harness take
    ten seconds to read."""
    import lm_eval.tasks.ruler.prepare_niah as niah

    made = niah.generate_samples
    monkeypatch.setattr(
        "lm_eval.tasks.ruler.niah_utils.generate_samples",
        lambda *given, **options: made(*given, **{**options, "num_samples": 3}),
    )
    return Path(niah.__file__).parent


@needs_ruler
@pytest.mark.filterwarnings("default")
def test_ruler_is_told_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    marked: Any,
) -> None:
    options: dict[str, Any] = {"tasks": ["niah_single_1"], "limit": 2}
    options["include_path"] = ruler_files(monkeypatch)
    capsys.readouterr()  # what the task's code prints when it is first imported
    found = read(metadata={"max_seq_lengths": [1500]}, **options)
    assert 1000 < len(found.sequences[0]) <= 1500
    evidence, question = marked(found)["evidence"], marked(found)["question"]
    assert len(evidence) == len(question) == 1
    key = evidence[0].removeprefix("One of the special magic numbers for ").partition(" is: ")[0]
    assert key in question[0] and question[0].endswith("mentioned in the provided text?")
    # What the harness would draw, whatever was drawn before.
    again = read(metadata={"max_seq_lengths": [1500]}, **options)
    assert [t.tolist() for t in again.sequences] == [t.tolist() for t in found.sequences]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    with pytest.raises(RetraceError, match=r"4096 tokens, .*--max-length 4096, or .*\[2000\]"):
        read(most=2000, **options)
