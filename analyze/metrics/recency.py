"""Which of the keys that a query attends were touched lately: the walk that counts `Locality`.

A query looks up all its keys in what was there before it, and then touches them, and its own
position, which was just written: in ascending order, later positions being more recent. A buffer
of N keys that drops what was touched longest ago holds the N keys touched last, whatever N (Mattson
et al., Evaluation techniques for storage hierarchies, 1970): a key is there if fewer than N others
were touched after it.

How many that were is not needed, only between which sizes it lies. So all touches stand in one
line, and of each size it is known where the oldest key held stands. That place only moves on, so
each touch is passed once, and a lookup compares one number with a few.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from retrace.analyze.compiled import compiled
from retrace.analyze.metrics.locality import (
    ATTENDED,
    DISTANCES,
    FIRST,
    QUERIES,
    REPEATED,
    RETURNED,
    SHARED,
    SIZES,
    SPANS,
    WINDOWS,
    WORKING,
    WRITTEN,
    Locality,
    misses,
)
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, Unit

Ids = NDArray[np.int32]

NONE = np.iinfo(np.int32).max
"""Behind all keys of a list."""
FIRST_DISTANCE, FIRST_WORKING, FIRST_WINDOW = DISTANCES.start, WORKING.start, WINDOWS.start
SPAN_COUNT, LONGEST = len(SPANS), SPANS[-1]
LATER = np.ceil(np.log2(np.maximum(1, np.arange(LONGEST + 2)))).astype(np.int32)
"""The first span that a key is within which was attended so many queries ago; one more than there
are for longer."""


class _Line(NamedTuple):
    """All touches of each budget and cache (budgets, caches, ...), oldest first."""

    place: Ids
    """Where each key was touched last; -1 for never."""
    key: Ids
    """The key touched at each place."""
    live: NDArray[np.bool_]
    """Whether it was not touched again."""
    oldest: Ids
    """Where the oldest key is that a buffer of each size holds (..., sizes)."""
    held: Ids
    """How many keys it holds."""
    end: Ids
    """One past the last place (...,)."""
    attended: Ids
    """The last query that attended each key, by its number; -1 for none."""
    at_query: Ids
    """How many keys each query was the last to attend."""
    working: Ids
    """Working set at the last query, of each span."""
    queries: Ids
    """How many queries there were (...,)."""


class RecentKeys:
    """The keys that one method's queries touched in one unit, query by query.

    It takes some 22 bytes for each budget, each head of the group and one more, and each position.
    """

    def __init__(self, unit: Unit, topk: Sequence[int]) -> None:
        group, length = unit.group.rules.group, len(unit.keys)
        self.found = Locality.empty(len(topk), 1, group)
        """What was counted so far."""
        self._topk = tuple(topk)
        self._full = float(unit.group.key_bytes + unit.group.value_bytes)
        budgets, _, caches, _ = self.found.counts.shape
        sizes = min(len(SIZES), (length - 1).bit_length() + 1)

        def numbers(*shape: int, of: int = 0) -> Ids:
            return np.full((budgets, caches, *shape), of, np.int32)

        self._line = _Line(
            place=numbers(length, of=-1),
            key=numbers(2 * length + 2),
            live=np.zeros((budgets, caches, 2 * length + 2), np.bool_),
            oldest=numbers(sizes),
            held=numbers(sizes),
            end=numbers(),
            attended=numbers(length, of=-1),
            at_query=numbers(len(unit.positions)),
            working=numbers(len(SPANS)),
            queries=numbers(),
        )

    def add(
        self, block: Block, selection: Selection, points: Sequence[int], first: Sequence[int]
    ) -> None:
        """Follow the next queries.

        Args:
            block: these queries, the ones after those that were added last.
            selection: the keys that they attend.
            points: indices into `selection.ks` of the budgets that are followed.
            first: the first position that counts for each budget of the selection (budgets,).
        """
        # On a GPU the lists are copied: as many numbers as keys are attended.
        ids = selection.ids.to(torch.int32).cpu().numpy()
        attended = selection.attended[list(points)].cpu().expand(-1, *ids.shape[:2]).numpy()
        positions = block.positions.cpu().numpy()
        full = self._full if selection.attended_bytes is None else selection.attended_bytes
        before = self.found.counts.copy()
        for point, reached in zip(points, attended, strict=True):
            start = int(np.searchsorted(positions, first[point]))
            if start == len(positions):
                continue
            budget = self._topk.index(selection.ks[point])
            lists = _ascending(ids[:, start:], reached[:, start:])
            _follow(
                lists,
                _together(lists),
                positions[start:],
                _Line(*(field[budget] for field in self._line)),
                self.found.counts[budget, 0],
            )
        self.found.missed_bytes[...] += misses(self.found.counts - before) * full


def _ascending(ids: Ids, reached: NDArray[np.int64]) -> Ids:
    """The keys that are attended of each list (group, queries, any), ascending; `NONE` behind."""
    ids = ids[..., : int(reached.max(initial=0))]
    unread = (np.arange(ids.shape[-1]) >= reached[..., None]) | (ids < 0)
    return np.sort(np.where(unread, np.int32(NONE), ids), axis=-1)


def _together(lists: Ids) -> Ids:
    """The keys of all heads (1, queries, any), ascending, some of them several times; of one head
    nothing."""
    group, rows, listed = lists.shape
    if group == 1:
        return lists[:0]
    return np.sort(lists.transpose(1, 0, 2).reshape(1, rows, group * listed), axis=-1)


@compiled
def _follow(
    lists: Ids, together: Ids, positions: NDArray[np.int64], line: Any, counts: Any
) -> None:
    """Add queries to the line of each cache, and to its counts (caches, FIELDS)."""
    group, rows, _ = lists.shape
    sizes = line.oldest.shape[1]
    most = max(lists.shape[2], together.shape[2])
    passed = np.empty(sizes + 1, np.int64)
    ago = np.empty(SPAN_COUNT + 1, np.int64)
    for cache in range(group + len(together)):
        of_all = lists[cache] if cache < group else together[0]
        place, key, live = line.place[cache], line.key[cache], line.live[cache]
        oldest, held, working = line.oldest[cache], line.held[cache], line.working[cache]
        attended, at_query, tally = line.attended[cache], line.at_query[cache], counts[cache]
        for row in range(rows):
            now, end, position = line.queries[cache], line.end[cache], positions[row]
            if end + min(most + 1, len(place)) > len(key):
                end = _close_ranks(place, key, live, oldest, end)
            passed[:] = 0
            ago[:] = 0
            read, written, first, shared, heads = 0, 0, 0, 0, 0
            before = np.int32(-1)
            for known in of_all[row]:
                if known == NONE:
                    break
                if known == before:
                    shared += heads  # with each of the heads that attend it so far
                    heads += 1
                    continue
                before, heads = known, 1
                read += 1
                last = attended[known]
                if last >= 0:
                    ago[LATER[min(now - last, LONGEST + 1)]] += 1
                    at_query[last] -= 1
                elif known == position:
                    written += 1
                else:
                    first += 1
                attended[known] = now
                at = place[known]
                if known != position:  # it is not looked up
                    size = 0
                    for i in range(sizes):  # all of them: a guess of the first costs more
                        size += at < oldest[i]
                    passed[size] += 1
                    if at >= 0:
                        live[at] = False
                # No other key of the query is looked up by what changes here.
                place[known], key[end], live[end] = end, known, True
                end += 1
            at_query[now] = read
            if now:
                again = ago.sum()
                tally[QUERIES] += 1
                tally[ATTENDED] += read
                tally[WRITTEN] += written
                tally[FIRST] += first
                tally[REPEATED] += ago[0]
                tally[RETURNED] += again - ago[0]
                tally[SHARED] += shared
                for size in range(sizes):
                    tally[FIRST_DISTANCE + size] += passed[size]
            within = 0
            for span in range(SPAN_COUNT):
                long = 1 << span
                within += ago[span]
                gone = at_query[now - long] if now >= long else 0
                working[span] += read - within - gone
                if now >= long - 1:
                    tally[FIRST_WORKING + span] += working[span]
                    tally[FIRST_WINDOW + span] += 1
            touched = read
            if not written:  # the query's own key is there though nobody attends it
                place[position], key[end], live[end] = end, position, True
                end, touched = end + 1, touched + 1
            outside = touched
            for size in range(sizes):
                outside -= passed[size]  # those that a buffer of this size did not hold
                held[size] += outside
                room = 1 << size
                if room <= touched:
                    oldest[size], held[size] = end - room, room
                while held[size] > room:
                    held[size] -= live[oldest[size]]
                    oldest[size] += 1
            line.queries[cache], line.end[cache] = now + 1, end


@compiled
def _close_ranks(place: Ids, key: Ids, live: Any, oldest: Ids, end: int) -> int:
    """Take the keys that were touched again out of a line; returns its end."""
    moved, size = 0, len(oldest) - 1  # larger buffers begin earlier
    for at in range(end):
        while size >= 0 and oldest[size] == at:
            oldest[size] = moved
            size -= 1
        if live[at]:
            place[key[at]] = moved
            key[moved] = key[at]
            moved += 1
    for left in range(size + 1):
        oldest[left] = moved
    live[:moved] = True
    live[moved:] = False
    return moved
