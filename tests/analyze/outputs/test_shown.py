"""Text of files is shown, and not obeyed."""

import pytest

from retrace.analyze.outputs.markdown import markdown_table
from retrace.analyze.outputs.shown import shown


@pytest.mark.parametrize(
    "mark", ["\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2066", "\u2028", "\ud800"]
)
def test_what_a_terminal_obeys_is_spelt_out(mark: str) -> None:
    text = shown(f"layers{mark}.0")
    assert mark not in text
    assert text.startswith("layers\\")
    text.encode()


def test_the_rest_stays() -> None:
    text = "Größe, 長さ, 🙂\tand\nmore"
    assert shown(text) == text


def test_tables() -> None:
    import pandas as pd

    table = markdown_table(pd.DataFrame({"Layer": ["a\x1b[2Jb\nc"]}))
    assert table.splitlines()[2] == "| a\\x1b[2Jb c |"
