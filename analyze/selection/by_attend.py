"""Keys that a method says it attended, with its own output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.hooks import calling, key_ids, numbers
from retrace.analyze.selection.charges import aux_bytes
from retrace.analyze.selection.served import Served, stretches
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


def select_by_attend(
    method: AttendMethod, serves: Sequence[Served], block: Block, k: int
) -> Selection:
    """The method's own output, and the keys it says it attended, for a block's queries, which one
    state after another answers, or none does.

    Answers are asked for state by state; they are looked at once for all.
    """
    if serves[0].state is None:
        return _exact_best(block, k)
    parts = stretches(serves, block)
    answers = [_answer(method, part.served.state, part.block, k) for part in parts]
    listed = max(ids.shape[-1] for _, ids in answers)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(i, (0, listed - i.shape[-1]), value=-1) for _, i in answers], dim=1)
    # A copy, since the method may use its tensor again.
    output = torch.cat([own for own, _ in answers], dim=1)
    check_finite(output, "attend()", block)
    check_ids(ids, block)
    ids = missing_last(ids)
    states, group = [part.served.state for part in parts], block.unit.group
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        output=output[None],
        aux_bytes=aux_bytes(method, [(part.served.state, part.block) for part in parts], block),
        attended_bytes=method.attended_bytes(group),
        unread=ALL_READ if all(method.reads_cache(state, group) for state in states) else None,
    )


def _answer(method: AttendMethod, state: Any, block: Block, k: int) -> tuple[Tensor, Tensor]:
    """The output (group, queries, value channels) and ids (group, queries, any) of one state's
    queries."""
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
    return output, ids


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
