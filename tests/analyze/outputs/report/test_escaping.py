"""Results are data: whatever stands in their names, a page runs its own two scripts alone."""

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest

from retrace.analyze import Results
from retrace.analyze.outputs.report.page import page
from retrace.analyze.outputs.report.script import script

pytest.importorskip("plotly", reason="needs the report extra")

Make = Callable[..., Results]
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.hacked = 1'>",
    "$hashes ${style} & \"quoted\" 'twice'",
    "\u2028]]>",
]


@pytest.fixture(scope="module")
def hostile(made: Make, held: Any) -> Any:
    """A page of results whose every name means ill."""
    results = made([0], 2, ["exact", *HOSTILE], [5], [5], task=HOSTILE[0])
    results.metrics["module"] = HOSTILE[0]
    return held(page({HOSTILE[0]: results}))


def test_names_add_no_tag(made: Make, held: Any, hostile: Any) -> None:
    plain = held(page({"r": made([0], 2, ["exact", "quest"], [5], [5])}))
    assert [tag for tag, _ in hostile.parts.tags] == [tag for tag, _ in plain.parts.tags]


def test_names_are_kept_but_what_would_not_be_seen_is_spelt_out(hostile: Any) -> None:
    [run] = hostile.index["runs"]
    names = ["exact", *HOSTILE[:-1], r"\u2028]]>"]
    assert [entry["method"] for entry in hostile.index["entries"]] == names
    assert run["modules"] == [HOSTILE[0]] and run["name"] == HOSTILE[0]
    assert run["facts"]["task"] == [{"task": HOSTILE[0]}]
    assert "<" not in hostile.parts.scripts["index"]


def test_only_the_pages_own_scripts_may_run(hostile: Any) -> None:
    from plotly.offline import get_plotlyjs

    [policy] = [a["content"] for _, a in hostile.parts.tags if "http-equiv" in a]
    digests = re.findall(r"'sha256-([^']+)'", policy)
    own = [hostile.parts.scripts[""], get_plotlyjs()]
    assert digests == [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in own
    ]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert "unsafe" not in directives["script-src"]


def test_nothing_is_loaded_from_elsewhere(hostile: Any) -> None:
    for tag, attributes in hostile.parts.tags:
        assert tag not in ("link", "iframe", "img", "object", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_the_script_makes_no_html_of_text() -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script()
