"""`show`: one query, its best keys, and which of them each method takes and misses."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import pandas as pd
import torch

from retrace.analyze.commands.analyze import ready_methods
from retrace.analyze.commands.setup import Asked, settle
from retrace.analyze.methods.specs import Methods, PlanSpec
from retrace.analyze.options import ShowOptions, with_defaults
from retrace.analyze.replay.clock import Clock
from retrace.analyze.replay.one_query import Attended, QueryAnswers, answer_one
from retrace.analyze.replay.plan import Replayed
from retrace.analyze.replay.settings import Settings
from retrace.analyze.tables.one_query import AROUND, BEFORE, FIGURE_COLUMNS, KEY_COLUMNS, OneQuery
from retrace.analyze.units.unit import load_units
from retrace.analyze.workers.start import threads
from retrace.traces import Location, RetraceError, Trace

Texts = Callable[[Sequence[int]], Sequence[str]]
"""The text of each of some token ids."""
TextsOf = Callable[[Trace], Texts]
"""Finds that of a trace; raises `RetraceError` where there is none."""


def show(
    trace: Trace | str | Location,
    methods: Methods = ("exact",),
    topk: int = 10,
    *,
    layer: int,
    head: int,
    position: int,
    sequence: int | None = None,
    texts: Texts | None = None,
    **options: Unpack[ShowOptions],
) -> OneQuery:
    """What one query attends to exactly, and what methods attend to in its place.

    Args:
        trace: a trace or where it is: a path or a URL.
        methods: as `analyze` takes them.
        topk: the budget: keys per query and head, and best keys that are listed.
        layer: of the model.
        head: of the layer's query heads.
        position: of the query in its sequence.
        sequence: of the trace; the first that no method learns from if None.
        texts: gives the texts of token ids, such as `retrace.capture.token_texts(trace)` has them.
        options: `retrace.analyze.options.ShowOptions` says what each is.

    Returns:
        The query's figures are those that it has among all queries of a run.

    Raises:
        RetraceError: there is no such query, or what `analyze` raises.
    """
    chosen = with_defaults(options, ShowOptions) | {"layers": [layer], "min_context": 0}
    asked = Asked.of(trace, methods, (topk,), chosen)
    for spec in asked.specs:
        if isinstance(spec, PlanSpec):
            raise RetraceError(
                f"{spec} has a method and budget for each kv head: name those of this one, as "
                "`retrace plan` lists them."
            )
    settled = settle(asked)
    settings, device = settled.settings, settled.device
    place = find_query(settings, layer, head, sequence, position)
    with threads(device, 1) as pool:
        ready = ready_methods(asked, settled, Clock(device), pool)
    return look(settings, ready, device, place, texts)


def find_query(
    settings: Settings, layer: int, head: int, sequence: int | None, position: int
) -> tuple[int, int, int, int]:
    """The layer, head, sequence and position of a query that there is.

    Raises:
        RetraceError: there is none; names what there is.
    """
    trace, heads = settings.trace, settings.trace.layer(layer).rules.heads
    if not 0 <= head < heads:
        raise RetraceError(f"Layer {layer} has no head {head}: expected 0 to {heads - 1}.")
    if sequence is None:
        sequence = settings.sequences[0]
    if sequence in settings.calibration:
        raise RetraceError(
            f"Methods learn from sequence {sequence}: name another one, or other sequences to "
            "learn from (--calibration)."
        )
    if sequence not in settings.sequences:
        there = ", ".join(map(str, settings.sequences))
        raise RetraceError(f"{trace.path} has no finished sequence {sequence}; it has {there}.")
    positions = trace.query_positions(sequence)
    if position not in positions:
        near = positions[abs(positions - position).argsort(kind="stable")[:3]]
        raise RetraceError(
            f"Sequence {sequence} has no query at position {position}; near it are those at "
            f"{', '.join(map(str, sorted(near.tolist())))}."
        )
    protocol = settings.counting.protocol
    first = protocol.first_query(trace.length(sequence))
    if position < first:
        raise RetraceError(
            f"The protocol {protocol} asks the queries from position {first} on, and not the one "
            f"at {position}: name a later one, or give another --protocol."
        )
    return layer, head, sequence, position


def look(
    settings: Settings,
    methods: Sequence[Replayed],
    device: torch.device,
    place: tuple[int, int, int, int],
    texts: Texts | None,
) -> OneQuery:
    """What methods, calibrated and at one budget each, attend for the query at a place that
    `find_query` gave."""
    index, head, sequence, position = place
    layer = settings.trace.layer(index)
    kv_head, own = divmod(head, layer.rules.group)
    units = load_units(layer, sequence, device)
    unit = next(unit for unit in units if unit.group.kv_head == kv_head)
    protocol = settings.counting.protocol
    answers = answer_one(unit, own, position, methods, protocol)
    (k,) = methods[0].topk
    # The query sees no later ones.
    words = _Words(settings.trace.tokens(sequence)[: position + 1].tolist(), texts)
    return OneQuery(
        trace=str(settings.trace.path),
        layer=index,
        module=layer.rules.module,
        head=head,
        kv_head=kv_head,
        sequence=sequence,
        position=position,
        visible=answers.visible,
        topk=k,
        protocol=str(protocol),
        tokens=pd.DataFrame(
            [
                {"position": at, "token": words.ids[at], "text": words.text(at)}
                for at in range(max(0, position - BEFORE), position + 1)
            ]
        ),
        keys=_keys(answers, words),
        figures=_figures(answers),
    )


class _Words:
    """The tokens that a query sees, and their texts."""

    def __init__(self, ids: list[int], texts: Texts | None) -> None:
        self.ids = ids
        self._texts = texts
        self._known: dict[int, str] = {}

    def text(self, start: int, stop: int | None = None) -> str:
        """The text of a token, or of those up to one; empty where none is known."""
        if self._texts is None:
            return ""
        wanted = self.ids[max(0, start) : start + 1 if stop is None else stop]
        if new := [token for token in dict.fromkeys(wanted) if token not in self._known]:
            self._known |= zip(new, self._texts(new), strict=True)
        return "".join(self._known[token] for token in wanted)


def _keys(answers: QueryAnswers, words: _Words) -> pd.DataFrame:
    """A row for each method and key that is among the best or that it attends."""
    ranks = {key: i + 1 for i, key in enumerate(answers.best.ids.tolist())}
    best = _shares(answers.best)
    rows: list[dict[str, Any]] = []
    for answer in answers.methods:
        attended = _shares(answer.keys)
        rows += [
            {
                "method": answer.method,
                "key": key,
                "token": words.ids[key],
                "text": words.text(key),
                "around": words.text(key - AROUND, key + AROUND + 1),
                "rank": ranks.get(key),
                "probability": share,
                "attended": key in attended,
            }
            for key, share in (best | attended | best).items()
        ]
    return pd.DataFrame(rows, columns=KEY_COLUMNS).astype({"rank": "Int64"})


def _shares(keys: Attended) -> dict[int, float]:
    """Probabilities by key, in their order."""
    return dict(zip(keys.ids.tolist(), keys.probabilities.tolist(), strict=True))


def _figures(answers: QueryAnswers) -> pd.DataFrame:
    """A row for each method."""
    best = set(answers.best.ids.tolist())
    rows = []
    for answer in answers.methods:
        attended = answer.keys.ids.tolist()
        taken = len(best.intersection(attended))
        counts = {"keys": len(attended), "best_taken": taken, "best_missed": len(best) - taken}
        rows.append({"method": answer.method, **counts, **answer.figures})
    return pd.DataFrame(rows, columns=FIGURE_COLUMNS)
