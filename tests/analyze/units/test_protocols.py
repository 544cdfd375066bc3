"""Protocols: which queries are answered together, and from what."""

import pytest

from retrace.analyze.replay.counting import Counting
from retrace.analyze.units.protocol import Protocol
from retrace.traces import RetraceError


@pytest.mark.parametrize("text", ["all:512", "prefix:64", "prefill:128", "prefill:64:chunk=256"])
def test_round_trip(text: str) -> None:
    assert str(Protocol.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["prefill", "prefill:0", "prefill:128:chunk=100", "prefill:8:chunk=0", "prefill:0.5"]
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(RetraceError, match=r"prefill:B:chunk=C \(C a multiple of B\)"):
        Protocol.parse(text)


@pytest.mark.parametrize(
    ("text", "position", "chunk"),
    [
        ("prefill:8", 40, (0, 50)),
        ("prefill:8:chunk=16", 15, (0, 16)),
        ("prefill:8:chunk=16", 16, (16, 32)),
        ("prefill:8:chunk=16", 49, (48, 50)),
    ],
)
def test_what_is_read_together(text: str, position: int, chunk: tuple[int, int]) -> None:
    assert Protocol.parse(text).chunk_of(position, 50) == chunk


def test_a_prefill_counts_every_query() -> None:
    counting = Counting.asked("prefill:8", None)
    assert [counting.first(k, 100) for k in (1, 99)] == [0, 0]
    assert counting.for_all(64) == counting == Counting.recorded(counting.facts())
    assert Counting.asked("prefill:8", 16).first(64, 100) == 16


@pytest.mark.parametrize("least", [12, "each"])
def test_a_prefill_counts_whole_blocks(least: int | str) -> None:
    with pytest.raises(RetraceError, match="expected a multiple of 8"):
        Counting.asked("prefill:8", least)
