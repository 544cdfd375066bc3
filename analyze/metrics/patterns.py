"""Which pattern of blocks covers a head's attention best: docs/prefill.md has the definition."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retrace.analyze.metrics.measure import ExactBlock
from retrace.analyze.metrics.moments import Array, Moments, empty
from retrace.analyze.metrics.possible import ROUNDING
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.unit import Unit

PATTERNS = ("given", "local", "vertical", "slash", "block")
"""`given`: the first block of keys and each block's own alone. Of the others each holds, besides
these, the most recent blocks, the best columns, the best diagonals, or the best blocks."""
KINDS = PATTERNS[1:]
"""What a head can be."""
SHARE = 0.1
"""Of the pairs of blocks that are not given, those that a pattern has."""
ENOUGH = 0.9
"""Of what the best blocks hold besides what is given: with less in any other pattern, `block`."""
MORE = 1.05
"""How many times as much as the recent blocks, which are diagonals too, `slash` must hold."""
MOST_BLOCKS = 512
"""Along a sequence: of longer ones several make one, so that memory is bounded."""


class BlockMasses:
    """Attention mass of every block of queries of a unit on every block of keys, gathered while the
    queries are answered, and what patterns hold of it."""

    def __init__(self, unit: Unit, rows: int) -> None:
        """Blocks of so many `rows`, as the protocol has them."""
        self._unit, self._rows = unit, rows
        together = -(-len(unit.keys) // (rows * MOST_BLOCKS))
        self._size = rows * together
        blocks = -(-len(unit.keys) // self._size)
        self._masses = torch.zeros(
            len(unit.queries), blocks, blocks, dtype=torch.float64, device=unit.keys.device
        )
        self._queries = 0
        self._counted = torch.zeros(blocks, dtype=torch.bool, device=unit.keys.device)

    def add(self, exact: ExactBlock) -> None:
        """Add whole blocks of queries."""
        keys = exact.key_masses(self._rows)
        count, size = self._masses.shape[-1], self._size
        whole = torch.nn.functional.pad(keys, (0, count * size - keys.shape[-1]))
        pooled = whole.view(*keys.shape[:2], count, size).sum(dim=-1, dtype=torch.float64)
        first = int(exact.block.positions[0])
        for place in range(pooled.shape[1]):
            row = (first + place * self._rows) // size
            self._masses[:, row] += pooled[:, place]
            self._counted[row] = True
        self._queries += len(exact.block.positions)

    def moments(self) -> Moments:
        """The share of attention mass that each of `PATTERNS` holds (patterns, group), as one
        sample; none of a sequence in which a pattern comes to less than a pair of blocks."""
        seen = self._seen()
        heads = [held_by_patterns(own.cpu().numpy(), seen) for own in self._masses]
        found = [own for own in heads if own is not None]
        if not found:
            return empty((len(PATTERNS), len(heads)))
        held = np.stack(found, axis=-1) / self._queries
        return Moments(np.ones_like(held), held, np.zeros_like(held))

    def _seen(self) -> npt.NDArray[np.bool_]:
        """Which blocks of keys hold one that a query of each block sees (blocks, blocks)."""
        blocks = torch.arange(len(self._counted), device=self._counted.device)
        oldest = first_visible(blocks * self._size, self._unit.group.rules)
        seen = (blocks <= blocks[:, None]) & ((blocks + 1) * self._size > oldest[:, None])
        marks: npt.NDArray[np.bool_] = (seen & self._counted[:, None]).cpu().numpy()
        return marks


def held_by_patterns(masses: Array, seen: npt.NDArray[np.bool_]) -> Array | None:
    """What each of `PATTERNS` holds (patterns,) of a head's masses (blocks of queries, blocks of
    keys), all of an equal number of pairs; None where that is less than one.

    A column or diagonal that there is no room for counts in part, by the share of its pairs.
    """
    place = np.arange(len(seen))
    far = place[:, None] - place
    free = seen & (place > 0) & (far > 0)
    room = SHARE * free.sum()
    if room < 1:
        return None
    given, single = masses[seen & ~free].sum(), masses[free]
    columns = np.where(free, masses, 0.0).sum(axis=0)
    diagonals = np.bincount(far[free], weights=single, minlength=len(seen)).astype(np.float64)
    lengths = np.bincount(far[free], minlength=len(seen)).astype(np.float64)
    held = (
        0.0,
        _within(diagonals, lengths, room),
        _best_within(columns, free.sum(axis=0).astype(np.float64), room),
        _best_within(diagonals, lengths, room),
        _best_within(single, np.ones(len(single)), room),
    )
    return np.array(held) + float(given)


def kinds(means: Array) -> npt.NDArray[np.int64]:
    """Which of `KINDS` each head is, by its place there, for means (patterns, heads)."""
    local, vertical, slash, block = means[1:] - means[0]
    lines = np.stack([local, vertical, np.where(slash > MORE * local, slash, 0.0)])
    enough = np.maximum(lines.max(axis=0), slash) >= ENOUGH * block
    return np.where(enough, lines.argmax(axis=0), KINDS.index("block"))


def checked_patterns(array: npt.NDArray[Any], heads: int) -> Moments:
    """Moments of `PATTERNS`, of the three parts that somebody wrote.

    Raises:
        ValueError: they cannot be of so many heads.
    """
    if array.dtype != np.float64 or array.shape != (3, len(PATTERNS), heads):
        raise ValueError("They are no moments of the patterns of heads.")
    moments = Moments(*array)
    within = (moments.mean >= 0) & (moments.mean <= 1 + ROUNDING)
    if not (within & (moments.count >= 0) & (moments.squares >= 0)).all():
        raise ValueError("They are patterns of heads that cannot be.")
    return moments


def _best_within(masses: Array, pairs: Array, room: float) -> float:
    """What the lines hold that have most by pair, of masses (lines,), each of so many pairs."""
    order = np.argsort(-masses / np.maximum(pairs, 1), kind="stable")
    return _within(masses[order], pairs[order], room)


def _within(masses: Array, pairs: Array, room: float) -> float:
    """What the first lines hold that there is room for, the last of them in part."""
    before = pairs.cumsum() - pairs
    part = np.clip((room - before) / np.maximum(pairs, 1), 0.0, 1.0)
    return float((masses * part).sum())
