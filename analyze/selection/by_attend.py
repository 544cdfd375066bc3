"""Keys that a method says it attended, with its own output."""

from typing import Any

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import (
    AttendMethod,
)
from retrace.analyze.methods.hooks import calling, key_ids, numbers
from retrace.analyze.selection.charges import aux_bytes
from retrace.analyze.units.selection import (
    ALL_READ,
    Selection,
    check_finite,
    check_ids,
    missing_last,
    where,
)
from retrace.analyze.units.unit import Block
from retrace.traces import RetraceError


def select_by_attend(method: AttendMethod, state: Any, block: Block, k: int) -> Selection:
    """The method's own output, and the keys it says it attended."""
    if state is None:
        return _exact_best(block, k)
    queries = block.queries * block.unit.group.rules.scale
    with calling("attend()", lambda: where(block)):
        answer = method.attend(state, queries, block.positions.clone(), k)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise RetraceError(f"attend() gave no pair of output and ids at {where(block)}.")
    output = numbers(answer[0], "attend()", lambda: where(block), queries)
    ids = key_ids(answer[1], "attend()", lambda: where(block), queries)
    expected = (*block.queries.shape[:2], block.unit.values.shape[1])
    if output.shape != expected:
        raise RetraceError(
            f"attend() gave an output of shape {tuple(output.shape)} at {where(block)}; expected "
            f"(group, queries, value channels) = {expected}."
        )
    if ids.dim() != 3 or ids.shape[:2] != expected[:2]:
        raise RetraceError(
            f"attend() gave ids of shape {tuple(ids.shape)} at {where(block)}; expected (group, "
            f"queries, any), with {expected[:2]} in front."
        )
    check_finite(output, "attend()", block)
    check_ids(ids, block)
    ids = missing_last(ids)
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        output=output[None].clone(),  # the method may use its tensor again
        aux_bytes=aux_bytes(method, [(state, block)], block),
        attended_bytes=method.attended_bytes(block.unit.group),
        unread=ALL_READ if method.reads_cache(state, block.unit.group) else None,
    )


def _exact_best(block: Block, k: int) -> Selection:
    """The k keys of largest exact score, for a fitted method that has no state yet."""
    ids = top(block.scores, k)[1]
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        aux_bytes=block.visible_count * block.unit.group.key_bytes,
        attended_bytes=block.unit.group.value_bytes,
        unread=ALL_READ,
    )
