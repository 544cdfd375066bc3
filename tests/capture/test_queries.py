"""Which queries are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.capture import capture
from retrace.capture.queries import parse_queries


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("last:2", 4, [2, 3]),
        ("last:9", 4, [0, 1, 2, 3]),
        ("stride:2", 4, [1, 3]),
        ("stride:3", 8, [1, 4, 7]),
        ("stride:9", 4, [3]),
        ("stride:1", 3, [0, 1, 2]),
    ],
)
def test_positions(text: str, length: int, expected: list[int]) -> None:
    positions = parse_queries(text).positions(length)
    assert positions.tolist() == expected
    assert positions.dtype == np.int32


@pytest.mark.parametrize("queries", ["last:12", "stride:8"])
def test_kept_queries_are_those_of_a_full_trace(
    queries: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    full, some = (
        capture(
            str(model_folder("mistral")),
            text=[text_file],
            limit=2,
            max_length=40,
            queries=kind,
            out=tmp_path / name,
        )
        for name, kind in (("full", "all"), ("some", queries))
    )
    kept = some.query_positions(1)
    assert kept.tolist() == parse_queries(queries).positions(40).tolist()
    np.testing.assert_array_equal(some.layer(1).query(1), full.layer(1).query(1)[:, kept])
    np.testing.assert_array_equal(some.layer(1).key(1), full.layer(1).key(1))
    np.testing.assert_array_equal(some.layer(1).value(1), full.layer(1).value(1))
