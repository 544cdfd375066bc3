"""The site is built without a warning, and its pages say what the code says."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("traces", "analyze", "capture", "cli")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("material", "mkdocstrings_handlers.python", "mkdocs_click"):
        pytest.importorskip(library, reason="needs the docs extra")
    folder = tmp_path_factory.mktemp("site")
    told = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0 and "WARNING" not in told.stderr, told.stderr
    return folder


def test_the_site_has_a_page_of_each_kind(site: Path) -> None:
    wanted = {
        "index.html": "Where to go",
        "write-a-method/index.html": "aux_bytes",
        "methods/index.html": "arXiv:2406.10774",
        "api/index.html": "open_trace",
        "cli/index.html": "--min-context",
        "changes/index.html": "0.1.0",
        "contributing/index.html": "One idea a sentence",
    }
    for name, words in wanted.items():
        assert words in (site / name).read_text(encoding="utf-8"), name


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="([^"]+)"', text)
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page


def texts_of(file: Path) -> Iterator[str]:
    """Every text of a file's code, with {} where an f-string has a value."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_of_the_page_on_trouble_is_one_of_the_code() -> None:
    said = [
        text for top in PACKAGES for file in (ROOT / top).rglob("*.py") for text in texts_of(file)
    ]
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", page, re.M)
    assert len(messages) > 30
    assert not [message for message in messages if not any(message in text for text in said)]
