"""What a capture noted in its trace's attributes, where a program that wrote its own need not."""

from collections.abc import Mapping
from types import GenericAlias, UnionType
from typing import Any, get_args, get_origin

from retrace.traces.errors import RetraceError
from retrace.traces.reader import Trace

Kind = type | UnionType | GenericAlias


def noted(trace: Trace, path: str, kind: Kind) -> Any:
    """The attribute at a path such as `capture.max_length`.

    Args:
        trace: the trace.
        path: names within each other, with dots between.
        kind: what it must be: `str`, `int | None`, `list[int]`, `dict[str, Any]`.

    Raises:
        RetraceError: it is not there, or something else.
    """
    held: Any = trace.attributes
    for name in path.split("."):
        if not isinstance(held, Mapping) or name not in held:
            raise RetraceError(
                f"{trace.path} has no attribute {path}, which `retrace capture` writes: it serves "
                "where neither its model nor its capture is asked for."
            )
        held = held[name]
    if not _is(held, kind):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise RetraceError(
            f"{trace.path}: its attribute {path} is {str(held)[:80]!r}; expected {expected}."
        )
    return held


def _is(value: Any, kind: Kind) -> bool:
    """Whether a value of JSON is of a kind; true and false are no integers."""
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return isinstance(value, list) and all(_is(one, inner) for one in value)
    return type(value) is (get_origin(kind) or kind)
