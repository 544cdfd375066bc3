"""All that `analyze` demands of a method, on a small trace with every kind of layer."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from retrace.analyze import Results, analyze
from retrace.testing.traces import make_trace


def check_method(
    method: Any, topk: Sequence[int] = (4, 8), *, protocol: str = "all:32", **sizes: Any
) -> Results:
    """Replay a method on a small random trace, with all checks of `analyze`.

    The leak check comes first: an answer to a query must be the same alone, in a block, among other
    queries, with another future, and whatever was asked before. Then every layer is replayed, and
    shapes, types, numbers and bytes are checked.

    Args:
        method: a spec, an object, a class or an attention function.
        topk: budgets: keys per query and head.
        protocol: which queries are answered, and from what state; `prefill:32` for a `BlockMethod`.
        sizes: of the trace, as `make_trace` has them, such as `layers=[{"window": 24}]`.

    Returns:
        The results, to compare with what the method should reach.

    Raises:
        RetraceError: the method leaks, or answers with something else than was asked for; one line
            says what and where.

    >>> check_method("exact").table("exact", 8)["Mean Recall"].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    with TemporaryDirectory() as folder:
        trace = make_trace(Path(folder, "t.zarr"), **sizes)
        return analyze(
            trace, [method], topk, protocol=protocol, workers=1, device="cpu", keep_exact=False
        )
