"""Which queries are kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.capture import capture
from retrace.traces.queries import parse_queries


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("last:2", 4, [0, 1, 2, 3]),
        ("last:2", 100, range(36, 100)),
        ("last:70", 100, range(30, 100)),
        ("last:900", 100, range(100)),
        ("stride:16", 100, [3, 19, 35, *range(36, 100)]),
        ("stride:900", 100, range(36, 100)),
        ("stride:1", 100, range(100)),
    ],
)
def test_positions(text: str, length: int, expected: Sequence[int]) -> None:
    positions = parse_queries(text).positions(length)
    assert positions.tolist() == list(expected)
    assert positions.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last:2", [*range(16, 80), 98, 99]),
        ("stride:10", [9, *range(16, 80), 89, 99]),
        ("all", range(100)),
    ],
)
def test_the_end_of_the_prompt_is_kept_besides(text: str, expected: Sequence[int]) -> None:
    assert parse_queries(text).positions(100, prompt=80).tolist() == list(expected)


@pytest.mark.parametrize("queries", ["last:72", "stride:8"])
def test_kept_queries_are_those_of_a_full_trace(
    queries: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    full, some = (
        capture(
            str(model_folder("mistral")),
            text=[text_file],
            limit=2,
            max_length=100,
            queries=kind,
            out=tmp_path / name,
        )
        for name, kind in (("full", "all"), ("some", queries))
    )
    kept = some.query_positions(1)
    assert kept.tolist() == parse_queries(queries).positions(100).tolist()
    np.testing.assert_array_equal(some.layer(1).query(1), full.layer(1).query(1)[:, kept])
    np.testing.assert_array_equal(some.layer(1).key(1), full.layer(1).key(1))
    np.testing.assert_array_equal(some.layer(1).value(1), full.layer(1).value(1))
