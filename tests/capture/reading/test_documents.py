"""Documents in files: text as it was written, and the texts in tables."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrace.capture import CaptureSettings
from retrace.capture.reading.tasks import read_sequences
from retrace.capture.reading.windows import WindowCutter
from retrace.traces import RetraceError


class Characters:
    """One token per character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def read(path: Path, **settings: object) -> list[str]:
    """The sequences of a text file."""
    asked = CaptureSettings(pretrained="x", text=[path], **settings)  # type: ignore[arg-type]
    (found,) = read_sequences(asked, WindowCutter(Characters(), 100, asked.limit))
    return ["".join(map(chr, window)) for window in found.sequences]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_text(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("h\u00e9llo\r\nworld", encoding=encoding, newline="")
    assert read(path) == ["h\u00e9llo\nworld"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_in_data(name: str, encoding: str, tmp_path: Path) -> None:
    row = " = Bird = \n"
    contents = {
        "a.txt": row,
        "a.jsonl": json.dumps({"text": row}),
        "a.csv": f'text\n"{row}"\n',
    }
    path = tmp_path / name
    path.write_text(contents[name], encoding=encoding)
    settings = CaptureSettings(pretrained="x", tasks=["wikitext"], data=path)
    (found,) = read_sequences(settings, WindowCutter(Characters(), 100, None))
    assert "".join(map(chr, found.sequences[0])) == row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"a\xff", "is not UTF-8 text: invalid"),
        (b"fine " * 30_000 + b"\xff", "is not UTF-8 text: invalid"),
        ("hello".encode("utf-16"), "is not UTF-8 text but UTF-16: save it as UTF-8"),
        ("hello".encode("utf-32"), "is not UTF-8 text but UTF-32"),
        ("hello".encode("utf-16-le"), "NUL bytes"),
        (gzip.compress(b"hello", mtime=0), "compressed: decompress it first"),
        (b"PAR1 and so on", "a Parquet file: give it a name that ends in .parquet"),
    ],
)
def test_what_is_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(RetraceError, match=message) as refusal:
        read(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_text_that_begins_like_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("BZhang writes")
    assert read(path) == ["BZhang writes"]


TEXTS = ['one "bird"', "two\nbirds", "three, birds"]


@pytest.fixture
def table(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """TEXTS as a table, by the ending of its name."""
    path = tmp_path / f"a{request.param}"
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    if request.param in (".jsonl", ".ndjson", ".JSONL"):
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif request.param == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif request.param == ".csv":
        path.write_text("id,text\n" + "".join(f"1,{text}\n" for text in quoted))
    elif request.param == ".tsv":
        path.write_text("id\ttext\n" + "".join(f"1\t{text}\n" for text in quoted))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "table",
    [".jsonl", ".ndjson", ".JSONL", ".json", ".csv", ".tsv", ".parquet"],
    indirect=True,
)
def test_texts_of_a_table(table: Path) -> None:
    assert read(table) == TEXTS
    assert read(table, limit=2) == TEXTS[:2]


def test_rows_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert read(path) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"tex', "line 2 is no JSON"),
        ("a.jsonl", b'{"text": 3}', "line 1: what is in 'text' is no text"),
        ("a.jsonl", b'["a"]', "line 1: expected an object with a text in 'text'"),
        ("a.jsonl", b'{"body": "a"}', r"no text in 'text' \(line 1\); its columns: body"),
        ("a.jsonl", b"[" * 100_000, "cannot be read"),
        ("a.json", b"[1", "no JSON"),
        ("a.json", b"", "holds no text"),
        ("a.csv", b"body\na\n", "no text in 'text'"),
        ("a.parquet", b"PAR1PAR1", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "compressed: decompress it first"),
    ],
)
def test_tables_that_hold_no_text(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RetraceError, match=message) as refusal:
        read(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
