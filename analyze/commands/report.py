"""`report`: the page of results folders, as a file."""

from collections.abc import Sequence
from pathlib import Path

from retrace.analyze.outputs.report.page import page
from retrace.analyze.results import Results
from retrace.traces.storage.durable import written_whole
from retrace.traces.storage.lock import locked_file


def report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page of results folders, whole or not at all; returns the file.

    Raises:
        RetraceError: a folder holds no results, the page cannot be written there, or plotly is not
            installed.
    """
    out = Path(out)
    with locked_file(out):  # refused before the work
        places = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
        results = [Results.load(folder) for folder in places]
        text = page(dict(zip(_names(places), results, strict=True)))
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
