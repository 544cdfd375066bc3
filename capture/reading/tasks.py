"""Sequences of tokens: from tasks, which are sets of documents, and from plain text files."""

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from retrace.capture.model.hub import datasets_offline, hub_reachable
from retrace.capture.model.hub_trouble import noticed_trouble
from retrace.capture.reading.documents import TABLES, open_text, read_texts
from retrace.capture.reading.harness import Harness
from retrace.capture.reading.needle import read_needles
from retrace.capture.reading.prompts import read_prompts
from retrace.capture.reading.windows import SequenceSet, WindowCutter
from retrace.capture.settings import TASKS, CaptureSettings
from retrace.traces import RetraceError

ARTICLE_TITLE = re.compile(r" = [^=\n].* = $")
DATA_FILES = (".txt", *TABLES)


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub and how its rows make documents."""

    name: str
    configuration: str
    split: str
    column: str
    documents: Callable[[Iterable[str]], Iterator[str]]


def articles(rows: Iterable[str]) -> Iterator[str]:
    """WikiText's rows, which are lines, joined to its articles again.

    An article begins at a line ` = Title = `; the headings inside have more equals signs.

    >>> list(articles([" = A = ", " one ", " = = B = = ", " = C = ", " two "]))
    [' = A = \\n one \\n = = B = = \\n', ' = C = \\n two \\n']
    """
    article: list[str] = []
    for row in rows:
        line = row if row.endswith("\n") else row + "\n"
        if ARTICLE_TITLE.match(line.split("\n", 1)[0]) and "".join(article).strip():
            yield "".join(article)
            article = []
        article.append(line)
    if "".join(article).strip():
        yield "".join(article)


HUB_DATA: dict[str, HubData] = {
    "wikitext": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", articles)
}
assert (*HUB_DATA, "needle") == TASKS


def read_sequences(
    settings: CaptureSettings, cut: WindowCutter, harness: Harness | None = None
) -> tuple[SequenceSet, ...]:
    """The sequences that the settings ask for, task by task and file by file."""
    sets: list[SequenceSet] = []
    for task in settings.tasks:
        if task in HUB_DATA:
            sets.append(_read_task(task, settings.data, cut))
        elif task == "needle":
            texts = None if settings.data is None else local_texts(Path(settings.data), "", "text")
            sets.append(read_needles(settings, cut, texts))
        else:
            assert harness is not None
            sets += harness.read(task, cut)
    sets += [_read_text(Path(path), cut) for path in settings.text]
    sets += [read_prompts(Path(path), settings, cut) for path in settings.prompts]
    return tuple(sets)


def _read_text(path: Path, cut: WindowCutter) -> SequenceSet:
    if path.suffix.lower() in TABLES:
        windows = cut.windows(map(io.StringIO, read_texts(path, "text")))
    else:
        with open_text(path) as text:
            windows = cut.windows([text])
    if not windows:
        raise RetraceError(f"{path} holds no text: fewer than two tokens.")
    return SequenceSet("text", str(path), windows)


def _read_task(task: str, data: str | Path | None, cut: WindowCutter) -> SequenceSet:
    hub_data = HUB_DATA[task]
    source = f"{hub_data.name}/{hub_data.configuration}" if data is None else str(data)
    if data is None:
        rows = _hub_rows(task, hub_data)
    else:
        rows = local_texts(Path(data), hub_data.split, hub_data.column)
    windows = cut.windows(io.StringIO(document) for document in hub_data.documents(rows))
    if not windows:
        raise RetraceError(f"{source} holds no text for the task {task}.")
    return SequenceSet(task, source, windows)


def _hub_rows(task: str, data: HubData) -> Iterator[str]:
    import datasets

    reachable = hub_reachable()
    try:
        with (
            noticed_trouble() as trouble,
            contextlib.nullcontext() if reachable else datasets_offline(),
        ):
            rows = datasets.load_dataset(data.name, data.configuration, split=data.split)
    # Network, file and format each have errors of their own, of several packages.
    except Exception as error:
        if reachable and trouble.cause is not None:
            cause = f"the Hugging Face Hub {trouble.cause}"
        elif reachable:
            cause = first_line(error.__cause__ or error)
        else:
            cause = "it is not in the local cache and the Hugging Face Hub cannot be reached"
        raise RetraceError(
            f"The documents of {task} ({data.name}) cannot be loaded: {cause}. Check the network, "
            "name a local copy with --data PATH, or read any text file with --text FILE."
        ) from error
    for row in rows:
        yield row[data.column]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return line or type(error).__name__


def local_texts(path: Path, split: str, column: str) -> Iterator[str]:
    """The lines of text files, or the texts of tables' rows, at a path."""
    for file in _data_files(path, split):
        if file.suffix == ".txt":
            with open_text(file) as lines:
                yield from lines
        else:
            yield from read_texts(file, column)


def _data_files(path: Path, split: str) -> list[Path]:
    """The data files at a path; of a folder those of the split, where their names tell."""
    if path.is_file():
        files = [path] if path.suffix in DATA_FILES else []
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix in DATA_FILES)
        files = [file for file in files if split in file.stem] or files
        files = [file for file in files if file.suffix == files[0].suffix]
    if not files:
        raise RetraceError(f"{path} holds no data: expected {', '.join(DATA_FILES)}.")
    return files
