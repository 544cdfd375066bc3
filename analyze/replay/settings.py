"""The part of a run that all methods share: what is replayed and what counts."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from retrace.analyze.arguments import scores
from retrace.analyze.methods.hooks import naming
from retrace.analyze.methods.specs import MethodSpec, PlanSpec
from retrace.analyze.replay.calibration import calibration, calibration_name
from retrace.analyze.replay.calibration_file import GivenCalibration
from retrace.analyze.replay.counting import Counting
from retrace.analyze.replay.plan import Replayed
from retrace.analyze.replay.spans import counted_positions
from retrace.analyze.storage.provenance import engine
from retrace.analyze.units.costs import SERVING_DTYPE
from retrace.traces import RetraceError, Trace

log = logging.getLogger("retrace")


class Settings:
    """The part of a run that all methods share: what is replayed and what counts."""

    def __init__(
        self,
        trace: Trace,
        counting: Counting,
        layers: tuple[int, ...],
        calibration: tuple[int, ...],
        given: GivenCalibration | None = None,
    ) -> None:
        if not trace.sequences:
            raise RetraceError(
                f"{trace.path} has no finished sequence. Go on with the capture: "
                "`retrace capture ... --resume`."
            )
        finished = len(trace.sequences) + len(trace.left_out)
        if finished < trace.planned:
            log.warning(
                "%s is not complete: %d of %d sequences are finished, and only those are analyzed.",
                trace.path,
                finished,
                trace.planned,
            )
        self.trace = trace
        self.counting = counting
        self.layers = layers
        self.calibration = calibration
        self.given = given
        """What methods have learnt elsewhere, in place of any sequences of this trace."""
        self.sequences = tuple(s for s in trace.sequences if s not in calibration)
        if counting.where is not None:
            self._leave_out(counting.where)

    def _leave_out(self, where: str) -> None:
        """Leave out the sequences without a query in the spans of this name, a warning naming them.

        Raises:
            RetraceError: that is all of them.
        """
        inside = {s: counted_positions(self.trace, where, s, 0) for s in self.sequences}
        self._last_inside = {s: int(found[-1]) for s, found in inside.items() if len(found)}
        if not self._last_inside:
            raise RetraceError(
                f"--where {where}: {self.trace.path} holds no query there of a sequence that is "
                "analyzed: `capture --queries` says which are kept."
            )
        if without := [s for s in self.sequences if s not in self._last_inside]:
            log.warning(
                "%d of %d sequences have no query in %s and are left out: %s.",
                len(without),
                len(self.sequences),
                where,
                ", ".join(map(str, without)),
            )
        self.sequences = tuple(self._last_inside)

    def countable(self, budgets: Sequence[int]) -> tuple[int, ...]:
        """The budgets for which some query counts, a warning naming the others.

        Raises:
            RetraceError: no query counts for any of them.
        """
        fit = self._countable(budgets)
        if len(fit) < len(budgets):
            short = [k for k in budgets if k not in fit]
            needed = min(self._first(short[0], s) for s in self.sequences)
            last, where = max(map(self._last, self.sequences)), self.counting.where
            ends = "the longest sequence ends" if where is None else f"{where} ends"
            line = (
                f"No query counts for top-k {', '.join(map(str, short))}: "
                f"{'it takes' if len(short) == 1 else f'{short[0]} takes'} a position of at least "
                f"{needed}, and {ends} at {last}. Choose a smaller top-k, or "
                "lower the least position with --min-context."
            )
            if not fit:
                raise RetraceError(line)
            log.warning("%s", line)
        return fit

    def count_alike(self, budgets: Sequence[int]) -> tuple[int, ...]:
        """Count the same queries for all budgets: those of the largest that has any. Returns the
        budgets that have, as `countable` does."""
        fit = self.countable(budgets)
        self.counting = self.counting.for_all(fit[-1])
        return fit

    def count_as(self, begun: Counting, budgets: Sequence[int], folder: Path) -> tuple[int, ...]:
        """Count the queries that the results in a folder began with, a warning saying so where
        these budgets alone would have others. Returns the budgets that have any."""
        usual = [self.counting.for_all(k) for k in self._countable(budgets)[-1:]]
        self.counting = replace(self.counting, least=begun.least)
        if [self.counting] != usual:
            asked = ", ".join(map(str, budgets))
            other = [f"; top-k {asked} alone would have those {c.words()}" for c in usual]
            log.warning(
                "%s counts the queries %s, as it began, and goes on so%s. For others "
                "choose another folder with --out, or replace it with --overwrite.",
                folder,
                self.counting.words(),
                "".join(other),
            )
        return self.countable(budgets)

    def _countable(self, budgets: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            k for k in budgets if any(self._last(s) >= self._first(k, s) for s in self.sequences)
        )

    def _first(self, k: int, sequence: int) -> int:
        """The first position that counts for budget k."""
        return self.counting.first(k, self.trace.length(sequence))

    def _last(self, sequence: int) -> int:
        """The last position that there is a query of which may count."""
        if self.counting.where is not None:
            return self._last_inside[sequence]
        return int(self.trace.query_positions(sequence)[-1])

    @property
    def context(self) -> int:
        """The longest context, which budgets may be fractions of."""
        return self.counting.protocol.context(max(map(self.trace.length, self.sequences)))

    def check_fits(self, spec: MethodSpec) -> None:
        """Refuse a plan that is for another model.

        Raises:
            RetraceError: it is.
        """
        if isinstance(spec, PlanSpec):
            rules = {i: self.trace.layer(i).rules for i in self.layers}
            with naming(spec):
                spec.plan.check_fits(rules, str(self.trace.path))

    def scores(self) -> int:
        """How many exact scores the queries of all layers and sequences have."""
        return scores(self.trace, self.layers, self.sequences)

    def facts(self) -> dict[str, Any]:
        """What must be equal for results to stand in one folder."""
        return {
            "trace": [self.trace.digest(s) for s in self.sequences],
            **self.counting.facts(),
            "layers": list(self.layers),
            "calibration": list(self.calibration) or None,
            "serving_dtype": SERVING_DTYPE,
        }

    def check_same(self, before: Mapping[str, Any], folder: Path) -> None:
        """Refuse to add to results of other facts than `before`, a run's."""
        different = [name for name, value in self.facts().items() if before.get(name) != value]
        if "calibration" in different:
            raise RetraceError(
                f"{folder} holds results over other sequences than these, less those for "
                "calibration: choose another folder with --out, or replace it with --overwrite."
            )
        if different:
            raise RetraceError(
                f"{folder} holds results of another {' and '.join(different)}: choose another "
                "folder with --out, or replace it with --overwrite."
            )

    def calibrated(
        self,
        method: Replayed,
        device: torch.device,
        keep: bool,
        pool: Executor,
        again: bool = False,
    ) -> Replayed:
        """The method with what it, or each of a plan's methods, learns of every layer that it is
        used in, by the workers of the pool."""
        for spec in method.spec.each:
            if not spec.method.calibrated:
                continue
            layers = method.spec.layers_of(spec, self.layers)
            if self.given is not None:
                learnt = self.given.of(self.trace, spec, layers)
            else:
                learnt = calibration(
                    self.trace, spec, self.calibration, layers, device, keep, pool, again
                )
            method = method.having_learned(spec, learnt)
        return method

    @cached_property
    def engine(self) -> str:
        """Names the code of retrace that the run's figures come from."""
        return engine()

    def made_by(self, spec: MethodSpec) -> dict[str, str | None]:
        """What a method's figures come from besides what all methods of the run share; where one of
        these is another, the figures are of no more use."""
        return {
            "code": spec.code.digest,
            "engine": self.engine,
            "calibration": self.calibration_digest(spec),
        }

    def calibration_digest(self, spec: MethodSpec) -> str | None:
        """Names what a method learnt, and from what."""
        if not spec.method.calibrated:
            return None
        if len(spec.each) > 1:
            digests = [str(self.calibration_digest(one)) for one in spec.each]
            return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]
        (spec,) = spec.each
        if self.given is not None:
            return self.given.digest
        names = [calibration_name(self.trace, spec, self.calibration, i) for i in self.layers]
        return hashlib.sha256("".join(names).encode()).hexdigest()[:32]
