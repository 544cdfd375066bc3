"""The page of a report: results, a plotting library and a script, in one file."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from retrace.analyze.libraries import optional
from retrace.analyze.report.figures import figures_of
from retrace.analyze.report.packed import Packed, compressed
from retrace.analyze.results import Results
from retrace.analyze.shown import shown
from retrace.traces import RetraceError
from retrace.traces.durable import written_whole
from retrace.traces.lock import locked_file


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


def page(results: Mapping[str, Results]) -> str:
    """The page of results, by the names that they have there, as HTML.

    It loads nothing from anywhere, and its policy lets the browser run its own two scripts alone:
    what comes from results is data.

    Raises:
        RetraceError: results without a figure, or plotly is not installed.
    """
    for name, part in results.items():
        if part.metrics.empty:
            raise RetraceError(f"{name} holds no figures: its run measured nothing.")
    library, packed = _plotting_library(), Packed()
    index = figures_of(results, packed) | {"version": version("retrace-attention")}
    script = _part("page.js")
    return Template(_part("page.html")).substitute(
        title=html.escape(shown(", ".join(results))),
        hashes=" ".join(f"'sha256-{_digest(text)}'" for text in (script, library)),
        style=_part("page.css"),
        script=script,
        index=_embedded(index),
        figures=packed.text(),
        library=compressed(library.encode()),
    )


def _plotting_library() -> str:
    command = "pip install 'retrace-attention[report]'"
    text: str = optional("plotly.offline", command, "A report").get_plotlyjs()
    return text


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(folders):
            return names
        depth += 1


def _part(name: str) -> str:
    return files("retrace.analyze.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _all_shown(content: Any) -> Any:
    """JSON with every text as it is shown."""
    if isinstance(content, dict):
        return {shown(name): _all_shown(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_all_shown(value) for value in content]
    return shown(content) if isinstance(content, str) else content


def _embedded(content: Any) -> str:
    """JSON that no HTML can be read from: it holds neither `<`, nor `>`, nor `&`."""
    # JSON has no word for NaN and infinity, which Python writes all the same.
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    content = _all_shown(content)
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
