"""Bytes shared out over heads: the least for a loss of all together, or the least loss within some.

Each head has options, of so many bytes and so much loss, and takes one. On the lower convex hull of
its options the loss saved per byte falls from step to step, so that going on with whichever head
saves most per byte gives, after every step, the least loss of all choices that read no more (Fox,
Discrete Optimization via Marginal Analysis, 1966; the rate-distortion allocation of Shoham and
Gersho, 1988). Between two steps the best choice may be another, with options that are not on the
hull; it lies no lower than the line between the two, which is the `bound` here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One head's next option on its hull."""

    head: int
    option: int
    read: float
    """Bytes that it adds."""
    gain: float
    """Loss that it takes away."""


@dataclass(frozen=True)
class Path:
    """The choices from the fewest bytes on, step by step."""

    start: tuple[int, ...]
    """Each head's option of fewest bytes."""
    read: float
    loss: float
    """Of the start, all heads together."""
    steps: tuple[Step, ...]

    def options(self, count: int) -> list[int]:
        """Each head's option after so many steps."""
        chosen = list(self.start)
        for step in self.steps[:count]:
            chosen[step.head] = step.option
        return chosen

    @property
    def reads(self) -> list[float]:
        """Bytes after 0, 1, ... steps."""
        return [*accumulate((step.read for step in self.steps), initial=self.read)]

    @property
    def losses(self) -> list[float]:
        """Loss after 0, 1, ... steps."""
        return [*accumulate((-step.gain for step in self.steps), initial=self.loss)]

    def enough(self, meets: Callable[[int], bool]) -> int:
        """The fewest steps from which on every number of them meets something, which all do."""
        count = len(self.steps)
        while count and meets(count - 1):
            count -= 1
        return count

    def most(self, within: Callable[[int], bool]) -> int:
        """The most steps up to which every number of them is within something; -1 where even none
        is not."""
        counts = range(len(self.steps) + 1)
        return next((count for count in counts if not within(count)), len(counts)) - 1

    def least_read(self, loss: float) -> float:
        """Bytes that no choice with at most this loss is below: on the line between two steps."""
        return float(np.interp(-loss, [-one for one in self.losses], self.reads))

    def least_loss(self, read: float) -> float:
        """The loss that no choice of at most so many bytes is below."""
        return float(np.interp(read, self.reads, self.losses))


def hull(reads: Array, losses: Array) -> list[int]:
    """The options (options,) on the lower convex hull, from the fewest bytes on, each with less
    loss than the one before."""
    found: list[int] = []
    for i in np.lexsort((losses, reads)).tolist():
        if found and losses[i] >= losses[found[-1]]:
            continue
        while len(found) > 1 and _saves(reads, losses, found[-1], i) >= _saves(
            reads, losses, found[-2], found[-1]
        ):
            found.pop()
        found.append(i)
    return found


def _saves(reads: Array, losses: Array, one: int, other: int) -> float:
    """Loss saved per byte from one option to another."""
    return float((losses[one] - losses[other]) / (reads[other] - reads[one]))


def path(reads: Sequence[Array], losses: Sequence[Array]) -> Path:
    """The path over heads, of which each has the bytes and the losses (options,) of its options."""
    start, steps = [], []
    for head, (read, loss) in enumerate(zip(reads, losses, strict=True)):
        on_hull = hull(read, loss)
        start.append(on_hull[0])
        steps += [
            Step(head, after, float(read[after] - read[before]), float(loss[before] - loss[after]))
            for before, after in pairwise(on_hull)
        ]
    # A head's own steps stay in order: each saves less per byte than the one before.
    steps.sort(key=lambda step: -step.gain / step.read)
    begin = [(read[i], loss[i]) for read, loss, i in zip(reads, losses, start, strict=True)]
    total, lost = (float(sum(of)) for of in zip(*begin, strict=True))
    return Path(tuple(start), total, lost, tuple(steps))
