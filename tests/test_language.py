"""What is said to readers is short, and without the tics of this project's own writing.

A list of our own, since general linters of prose (proselint, Vale) know no words of this field and
stumble over its formulas: `CONTRIBUTING.md` has the rules.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.pages import MADE, PAGES, ROOT

MOST_WORDS = 30
TICS = {
    r"\bso that\b": "so, or because",
    r"\bcomes? to\b|\bcame to\b": "is, adds up to or gives",
    r"\bsimply\b|\bof course\b|\bobviously\b|\beasily\b": "leave it out",
    r"\bin order to\b": "to",
    r"\butili[sz]e|\bleverag(?:e|es|ing)\b (?!score)": "use",
}
"""What is not said, and what to say instead."""
LONG = {"prefill.md", "prompts.md", "decoding.md", "locality.md", "tails.md"}
"""Pages whose sentences are not yet cut."""
LIMITS = {"README.md": 140, "CONTRIBUTING.md": 120}
"""The most lines of pages that are read first."""
WRITTEN = [page for page in PAGES if page.name not in MADE]


def prose(page: Path) -> Iterator[str]:
    """Paragraphs and items of lists, each on one line; code, tables and comments are left out."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text("utf-8"), flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [li for li in paragraph.splitlines() if not li.startswith(("    ", "|", "#", "!["))]
        for item in re.split(r"\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines)):
            yield " ".join(item.split())


def sentences(text: str) -> list[str]:
    """Its sentences; code in them is one word, and of links their words alone."""
    plain = re.sub(r"`[^`]*`", "Code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    return re.split(r"(?<=[.!?:])\s+(?=[A-Z\"(*])", plain)


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


def test_sentences_are_counted() -> None:
    assert sentences("One `a. B` two. Three [four. five](x.md) six.") == [
        "One Code two.",
        "Three four. five six.",
    ]
    assert words("It is 3.5 % of all.") == 5


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_no_tic(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    if page.name == "CONTRIBUTING.md":  # which quotes them
        text = text[: text.index("## Language")]
    for tic, instead in TICS.items():
        found = re.search(rf"[^\n]*(?:{tic})[^\n]*", text, re.I)
        assert found is None, f"{page.name}: {instead}, in place of: {found[0]}"


@pytest.mark.parametrize("page", [p for p in WRITTEN if p.name not in LONG], ids=lambda p: p.name)
def test_sentences_are_short(page: Path) -> None:
    long = [s for text in prose(page) for s in sentences(text) if words(s) > MOST_WORDS]
    assert not long, f"{page.name}: at most {MOST_WORDS} words: {long}"


@pytest.mark.parametrize(("name", "most"), LIMITS.items())
def test_the_first_pages_are_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= most
