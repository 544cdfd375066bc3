"""Pages stay small enough to mail."""

from collections.abc import Callable
from typing import Any

import pytest

from retrace.analyze import Results
from retrace.analyze.metrics.registry import AT_BLOCKS, AT_MARKED
from retrace.analyze.outputs.report.page import page

pytest.importorskip("plotly", reason="needs the report extra")

Make = Callable[..., Results]


@pytest.mark.parametrize(
    ("layers", "heads", "methods", "megabytes"),
    # Random figures compress least: a trace's own make smaller pages. A page grows by as many bytes
    # with each figure: of 80 layers of 64 heads the last would be 28 MB.
    [(1, 1, 1, 2.2), (30, 9, 5, 4), (40, 32, 30, 10)],
    ids=["smallest", "small-model", "large-model"],
)
def test_size(made: Make, layers: int, heads: int, methods: int, megabytes: float) -> None:
    # What is held by position has a bound of its own.
    small: dict[str, Any] = {"positions": [128, 256, 512, 1024], "sequences": True}
    more = small if layers < 40 else {}
    names = ["exact", *(f"a-method:of={i},with=many,parameters=all" for i in range(methods - 1))]
    results = made(
        range(layers), heads, names, [10, 50, 100], [1, 2, 4, 8, 16, 32, 64, 100], **more
    )
    # All of one protocol: those of blocks of queries come with other methods. No keys are marked.
    others = [*AT_BLOCKS, *AT_MARKED]
    results.metrics = results.metrics[~results.metrics["metric"].isin(others)]
    text = page({"r": results})
    assert len(text) < megabytes * 1e6
