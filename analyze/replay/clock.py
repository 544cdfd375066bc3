"""Where a run's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pandas as pd
import torch

STEPS = (
    "calibration",
    "causality check",
    "forecast",
    "read",
    "exact answers read",
    "exact pass",
    "exact answers kept",
    "build",
    "search",
    "metrics",
    "locality",
)
"""What time is spent on, in the order in which a run comes to it. `build` makes a method's states,
`search` chooses keys, `metrics` compares them with exact attention, and `locality` follows them
from query to query."""
BEFORE = STEPS[:3]
"""What is done before the workers begin."""


class Charge(NamedTuple):
    """What time is spent on."""

    step: str
    """One of `STEPS`."""
    method: str | None = None
    """The spec of the method that it is spent for; None where all methods share it."""


class Clock:
    """Seconds spent, by what they were spent on.

    What several methods share and only some of them need, such as all exact scores where the exact
    answers are kept, counts for the one that asks first.
    """

    def __init__(self, device: torch.device, wait: bool = False) -> None:
        """With `wait` a GPU is waited for at both ends of every charge: otherwise what a step
        leaves to it counts for a later one."""
        self._device = device
        self._wait = wait and device.type == "cuda"
        self.seconds: defaultdict[Charge, float] = defaultdict(float)

    @property
    def synchronised(self) -> bool:
        """Whether every step is charged with all that it set going."""
        return self._wait or self._device.type != "cuda"

    def another(self) -> "Clock":
        """One for another thread, which counts from nothing."""
        return Clock(self._device, self._wait)

    @contextmanager
    def charge(self, step: str, method: str | None = None) -> Iterator[None]:
        """Charge what runs inside."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[Charge(step, method)] += self._now() - start

    def add(self, other: "Clock") -> None:
        """Add what another clock counted."""
        for charge, seconds in other.seconds.items():
            self.seconds[charge] += seconds

    def facts(self, wall: float, workers: int, methods: Sequence[str]) -> dict[str, Any]:
        """What is kept of a run of these methods that took `wall` seconds on so many workers."""
        order = {step: i for i, step in enumerate(STEPS)}
        charges = sorted(
            self.seconds, key=lambda c: (methods.index(c.method) if c.method else -1, order[c.step])
        )
        return {
            "wall": round(wall, 3),
            "workers": workers,
            "synchronised": self.synchronised,
            "spent": [
                {**charge._asdict(), "seconds": round(self.seconds[charge], 4)}
                for charge in charges
            ],
        }

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def profile_table(facts: dict[str, Any]) -> pd.DataFrame:
    """What `Clock.facts` kept, as a table.

    Columns: Step, Method ("" where all share it), Seconds, Of Wall, Of Thread-Seconds. Before the
    workers begin one thread is at work, and then all of them: a step's part of the wall is its
    seconds, or its seconds over the workers. Thread-seconds are those of the threads at work. The
    last row is what no step accounts for, the waiting of workers that have nothing left to do
    included.
    """
    wall, workers = facts["wall"], facts["workers"]
    rows = [
        (spent["step"], spent["method"] or "", spent["seconds"], spent["step"] in BEFORE)
        for spent in facts["spent"]
    ]
    before = sum(seconds for _, _, seconds, alone in rows if alone)
    threads = before + workers * (wall - before)
    rest = threads - sum(seconds for _, _, seconds, _ in rows)
    rows.append(("everything else", "", rest, False))
    return pd.DataFrame(
        {
            "Step": [step for step, *_ in rows],
            "Method": [method for _, method, *_ in rows],
            "Seconds": [seconds for *_, seconds, _ in rows],
            "Of Wall": [seconds / (1 if alone else workers) / wall for *_, seconds, alone in rows],
            "Of Thread-Seconds": [seconds / threads for *_, seconds, _ in rows],
        }
    )
