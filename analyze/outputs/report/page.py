"""The page of a report: results, a plotting library and a script, in one file."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from string import Template
from typing import Any

from retrace.analyze.optional import optional
from retrace.analyze.outputs.report.figures import figures_of
from retrace.analyze.outputs.report.packed import Packed, compressed
from retrace.analyze.outputs.report.script import script
from retrace.analyze.outputs.shown import shown
from retrace.analyze.tables.figures import Figures
from retrace.traces import RetraceError

Pictures = tuple[list[dict[str, Any]], str]
"""Worst queries as `picture_of` has them, and why some are missing."""


def page(results: Mapping[str, Figures], worst: Sequence[Pictures] = ()) -> str:
    """The page of results, by the names that they have there, as HTML; with pictures of the worst
    queries of each, if given.

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
    for run, (pictures, missing) in zip(
        index["runs"], worst or [([], "")] * len(results), strict=True
    ):
        run["worst"] = {"pictures": pictures, "missing": missing}
    return Template(_part("page.html")).substitute(
        title=html.escape(shown(", ".join(results))),
        hashes=" ".join(f"'sha256-{_digest(text)}'" for text in (script(), library)),
        style=_part("page.css"),
        script=script(),
        index=_embedded(index),
        figures=packed.text(),
        library=compressed(library.encode()),
    )


def _plotting_library() -> str:
    command = "pip install 'retrace-attention[report]'"
    text: str = optional("plotly.offline", command, "A report").get_plotlyjs()
    return text


def _part(name: str) -> str:
    return files("retrace.analyze.outputs.report").joinpath(name).read_text(encoding="utf-8")


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
