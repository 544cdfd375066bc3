"""Documents in files: plain text, and the texts in tables of rows."""

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from retrace.traces import RetraceError

NO_TEXT = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed",
    b"\x28\xb5\x2f\xfd": "compressed",
    b"\xfd7zXZ\x00": "compressed",
    b"BZh": "compressed",
    b"PK\x03\x04": "compressed",
    b"PAR1": "a Parquet file",
}
"""How a file begins that is no UTF-8 text, and what it is then."""
CURES = {
    "compressed": "decompress it first",
    "a Parquet file": "give it a name that ends in .parquet",
}
PEEKED_BYTES = 1 << 16

Rows = Iterator[tuple[str, Any]]
"""Where each row of a table stands, and the row."""


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file in UTF-8, to be read from its first character: a byte order mark is none.

    Raises:
        RetraceError: it is no such text, which may turn out while it is read.
    """
    try:
        with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            _refuse_other_kinds(path, file)
            yield text
    except UnicodeDecodeError as error:
        raise RetraceError(f"{path} is not UTF-8 text: {error.reason}.") from error


def _refuse_other_kinds(path: Path, file: IO[bytes]) -> None:
    begin = file.read(PEEKED_BYTES)
    file.seek(0)
    kind = next((NO_TEXT[mark] for mark in NO_TEXT if begin.startswith(mark)), None)
    if kind == "compressed" and begin.startswith(b"BZh") and begin[4:6] != b"1A":
        kind = None  # a text that begins with these letters
    if kind is None and b"\0" in begin:
        kind = "another encoding, or no text at all (it has NUL bytes)"
    if kind is not None:
        cure = CURES.get(kind, "save it as UTF-8")
        raise RetraceError(f"{path} is not UTF-8 text but {kind}: {cure}.")


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The text of each row of a table, whose kind the file's name tells (`TABLES`).

    Raises:
        RetraceError: it is no such table, or a row has no text in the column.
    """
    for place, row in read_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise RetraceError(_without_text(path, place, row, column))
        yield row[column]


def read_rows(path: Path) -> Rows:
    """The rows of a table, whose kind the file's name tells (`TABLES`); by any other name it is of
    JSON lines.

    Raises:
        RetraceError: it is no such table.
    """
    try:
        yield from TABLES.get(path.suffix.lower(), _json_lines)(path)
    except RetraceError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RetraceError(f"{path} cannot be read: {cause}.") from error


def _without_text(path: Path, place: str, row: Any, column: str) -> str:
    if not isinstance(row, dict):
        return f"{path}, {place}: expected an object with a text in {column!r}."
    if column in row:
        return f"{path}, {place}: what is in {column!r} is no text."
    return f"{path} has no text in {column!r} ({place}); its columns: {', '.join(map(str, row))}."


def _json_lines(path: Path) -> Rows:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _parsed(line, f"line {number}")


def _json(path: Path) -> Rows:
    """An array of rows, or rows one after another as JSON lines have them."""
    with open_text(path) as text:
        first = next((line.lstrip()[0] for line in text if line.strip()), "")
    if first != "[":
        yield from _json_lines(path)
        return
    with open_text(path) as text:
        for number, row in enumerate(_parsed(text.read(), "the array"), 1):
            yield f"row {number}", row


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error.msg}") from error


def _csv(path: Path, delimiter: str = ",") -> Rows:
    with open_text(path) as lines:
        # A text may be longer than the module's own limit, and no longer than the file.
        csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
        for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter), 1):
            yield f"row {number}", row


def _tsv(path: Path) -> Rows:
    return _csv(path, "\t")


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet

    number = itertools.count(1)
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=64):
            yield from ((f"row {next(number)}", row) for row in batch.to_pylist())


TABLES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""How files are read that hold rows with texts, by the ending of their name."""
