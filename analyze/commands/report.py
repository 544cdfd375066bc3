"""`report`: the page of results folders, as a file."""

from collections.abc import Sequence
from pathlib import Path

from retrace.analyze.commands.show import TextsOf
from retrace.analyze.commands.worst import worst_pictures
from retrace.analyze.outputs.report.page import page
from retrace.analyze.results import Results
from retrace.traces.storage.durable import written_whole
from retrace.traces.storage.lock import locked_file


def report(folders: Sequence[str | Path], out: str | Path, texts_of: TextsOf | None = None) -> Path:
    """Write the page of results folders, whole or not at all; returns the file.

    Their worst queries are drawn where their trace is on a local disk, with the tokens' texts that
    `texts_of` finds, such as `retrace.capture.token_texts` does.

    Raises:
        RetraceError: a folder holds no results, the page cannot be written there, or plotly is not
            installed.
    """
    out = Path(out)
    with locked_file(out):  # refused before the work
        places = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
        results = [Results.load(folder) for folder in places]
        worst = [worst_pictures(part, texts_of) for part in results]
        text = page(dict(zip(_names(places), results, strict=True)), worst)
        with written_whole(out) as file:
            file.write(text.encode())
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(folders):
            return names
        depth += 1
