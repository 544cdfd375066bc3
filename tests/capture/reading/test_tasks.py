"""Texts and documents as sequences of tokens."""

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrace.capture import CaptureSettings, capture
from retrace.capture.reading.tasks import articles, read_sequences
from retrace.capture.reading.windows import WindowCutter, tokens_before_text
from retrace.traces import RetraceError


class CountingTokenizer:
    """One token per character, counting the characters that it was given."""

    bos_token_id: int | None = None

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1 if bos else None
        self.characters = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.characters += len(text)
        bos = [1] if self.bos_token_id is not None and add_special_tokens else []
        return {"input_ids": bos + [ord(character) for character in text]}


def windows(text: str, max_length: int, limit: int | None = None, bos: bool = False) -> list[str]:
    """The windows of a text, BOS written as a caret."""
    cut = WindowCutter(CountingTokenizer(bos), max_length, limit)
    found = cut.windows([io.StringIO(part) for part in text.split("|")])
    return ["".join(map(chr, window)).replace(chr(1), "^") for window in found]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("abcdefg", {}, ["abc", "def"]),  # g alone predicts nothing
        ("abcdefgh", {}, ["abc", "def", "gh"]),
        ("abcdefgh", {"limit": 2}, ["abc", "def"]),
        ("abcdefg", {"bos": True}, ["^ab", "^cd", "^ef", "^g"]),
        ("abcd|efg|h", {}, ["abc", "efg"]),
        ("abcd|efgh|i", {"limit": 2}, ["abc", "efg"]),
        ("", {}, []),
    ],
)
def test_windows(text: str, options: dict[str, Any], expected: list[str]) -> None:
    assert windows(text, 3, **options) == expected


class Around:
    """A character is a token, with tokens before and after each text."""

    all_special_ids = (1, 2)

    def __init__(self, before: str, after: str = "", joined: bool = False) -> None:
        self.before, self.after, self.joined = before, after, joined

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        if not add_special_tokens:
            return {"input_ids": [ord(character) for character in text]}
        text = text.upper() if self.joined else text
        return {"input_ids": [ord(c) for c in self.before + text + self.after]}


@pytest.mark.parametrize("joined", [False, True], ids=["", "text differs"])
@pytest.mark.parametrize("before", ["", "\1", "\1\2", "\1\1"])
@pytest.mark.parametrize("after", ["", "\2"])
def test_every_window_begins_as_the_tokenizer_begins_a_text(
    before: str, after: str, joined: bool
) -> None:
    tokenizer = Around(before, after, joined)
    assert tokens_before_text(tokenizer) == list(map(ord, before))
    found = WindowCutter(tokenizer, 4, None).windows([io.StringIO("abcde")])
    content = 4 - len(before)
    parts = ["abcde"[i : i + content] for i in range(0, 5, content)]
    texts = ["".join(map(chr, window)) for window in found]
    assert texts == [before + part for part in parts if len(before + part) > 1]


def test_no_room_for_text() -> None:
    with pytest.raises(RetraceError, match=r"2 tokens before a text.*--max-length"):
        WindowCutter(Around("\1\2"), 2, None)


def test_no_more_is_tokenised_than_needed() -> None:
    tokenizer = CountingTokenizer()
    WindowCutter(tokenizer, 100, limit=2).windows([io.StringIO("a" * 1_000_000)])
    assert tokenizer.characters < 5_000


ROWS = [
    "",
    " = Bird = \n",
    "",
    " It sings . \n",
    " = = Song = = \n",
    " Loud . \n",
    " = Fish = \n",
    " It swims . \n",
]
ARTICLES = [
    "\n = Bird = \n\n It sings . \n = = Song = = \n Loud . \n",
    " = Fish = \n It swims . \n",
]


def test_articles_of_wikitext() -> None:
    assert list(articles(ROWS)) == ARTICLES
    assert list(articles(ARTICLES)) == ARTICLES  # whole documents stay as they are


def write_data(folder: Path, kind: str) -> Path:
    """ROWS as a data file, beside one of another split."""
    path = folder / f"test-00000.{kind}"
    if kind == "txt":
        path.write_text("".join(row or "\n" for row in ROWS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([row] for row in ROWS)])
    else:
        pq.write_table(pa.table({"text": ROWS}), path)
    path.with_name(f"valid-00000.{kind}").write_bytes(path.read_bytes())
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("whole_folder", [False, True], ids=["file", "folder"])
def test_local_data(kind: str, whole_folder: bool, tmp_path: Path) -> None:
    path = write_data(tmp_path, kind)
    settings = CaptureSettings(
        pretrained="x", tasks=["wikitext"], data=tmp_path if whole_folder else path
    )
    (found,) = read_sequences(settings, WindowCutter(CountingTokenizer(), 1000, None))
    assert found.task == "wikitext"
    assert ["".join(map(chr, window)) for window in found.sequences] == ARTICLES


def test_data_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "a", "page": "b"}\n')
    settings = CaptureSettings(pretrained="x", tasks=["wikitext"], data=path)
    with pytest.raises(RetraceError, match=r"no text in 'text' .*its columns: title, page"):
        read_sequences(settings, WindowCutter(CountingTokenizer(), 10, None))


def test_task_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A proxy that nothing listens at, as behind a cut connection.
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    settings = CaptureSettings(pretrained="x", tasks=["wikitext"])
    started = time.monotonic()
    with pytest.raises(RetraceError, match=r"Hub cannot be reached.*--data PATH"):
        read_sequences(settings, WindowCutter(CountingTokenizer(), 10, None))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("bos", [False, True])
def test_tasks_and_texts_in_one_trace(
    bos: bool, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    trace = capture(
        str(model_folder("llama", bos=bos)),
        tasks=["wikitext"],
        data=write_data(tmp_path, "txt"),
        text=[text_file],
        limit=2,
        max_length=30,
        out=tmp_path / "t",
    )
    assert trace.attributes["task"] == [
        {"task": "wikitext", "source": str(tmp_path / "test-00000.txt"), "sequences": 2},
        {"task": "text", "source": str(text_file), "sequences": 2},
    ]
    assert trace.attributes["tokenizer"]["starts_with_bos"] is bos
    assert trace.attributes["tokenizer"]["prefix"] == (["<s>"] if bos else [])
    assert [int(trace.tokens(s)[0] == 1) for s in range(4)] == [int(bos)] * 4
    text = text_file.read_text()
    assert len(trace.tokens(2)) == 30
    assert text.startswith("The 0 birds")
