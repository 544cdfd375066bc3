"""What is finished of a run, kept in its results folder until all of it is."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch

from retrace.analyze.methods.specs import recorded_spec
from retrace.analyze.metrics.buckets import AXES, MOST_BUCKETS
from retrace.analyze.metrics.locality import Locality
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.patterns import checked_patterns
from retrace.analyze.metrics.possible import impossible
from retrace.analyze.metrics.projection import checked_projected
from retrace.analyze.metrics.registry import (
    AT_ALL,
    AT_BLOCKS,
    AT_MARKED,
    AT_POINTS,
    BUCKETED,
    TAILED,
)
from retrace.analyze.metrics.tails import Tails
from retrace.analyze.replay.calibration_file import GivenCalibration
from retrace.analyze.replay.clock import Charge, Clock
from retrace.analyze.replay.counting import Counting
from retrace.analyze.replay.plan import Plan, Replayed
from retrace.analyze.replay.settings import Settings
from retrace.analyze.replay.tally import Tally
from retrace.analyze.selection.states import Cost
from retrace.analyze.storage.journal import Journal, Task, read_journals
from retrace.analyze.storage.npz import Arrays
from retrace.analyze.storage.untrusted import read_facts
from retrace.traces import Layer, RetraceError, open_trace
from retrace.traces.storage.durable import make_folder, this_process, within, written_whole

PARTS = ".parts"
"""Where parts are, in a results folder."""
KEPT_LOCALITY = ("counts", "missed_bytes")
"""The arrays of a `Locality`."""


@dataclass(frozen=True)
class Part:
    """What one task came to: a tally per method of the plan, and the time spent."""

    tallies: list[Tally]
    clock: Clock


@dataclass(frozen=True)
class Job:
    """A run, as all that is part of it must agree on."""

    settings: Settings
    methods: tuple[Replayed, ...]
    device: torch.device
    locality: bool = False
    """Whether it is followed how keys move from query to query."""
    projected: bool = False
    """Whether errors are told after the output projection too."""

    @cached_property
    def plan(self) -> Plan:
        """What is replayed of every unit."""
        counting = self.settings.counting
        return Plan(self.methods, counting, locality=self.locality, projected=self.projected)

    @property
    def tasks(self) -> list[Task]:
        """Every task, in the order in which their parts merge."""
        return [(i, s) for i in self.settings.layers for s in self.settings.sequences]

    @cached_property
    def digest(self) -> str:
        """Names what figures depend on: 32 hex digits."""
        facts = {
            "retrace": version("retrace-attention"),
            "device": self.device.type,
            **self.settings.facts(),
            "engine": self.settings.engine,
            "locality": self.locality,
            "projected": self.projected,
            "methods": [
                [
                    str(method.spec),
                    method.spec.parameters,
                    # What nobody can look at is never the same again.
                    method.spec.code.digest or uuid4().hex,
                    self.settings.calibration_digest(method.spec),
                    method.topk,
                ]
                for method in self.plan.methods
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """All that it takes to be read back where its trace and loose files are."""
        place, given = self.settings.trace.path, self.settings.given
        return {
            "trace": str(place.absolute() if isinstance(place, Path) else place),
            "left_out": list(self.settings.trace.left_out.items()),
            "sequences": self.settings.trace.sequences,
            **self.settings.counting.facts(),
            "layers": self.settings.layers,
            "calibration": self.settings.calibration,
            "calibration_from": None if given is None else [str(given.path), given.digest],
            "methods": [[m.spec.place, m.topk] for m in self.plan.methods],
            "device": str(self.device),
            "locality": self.locality,
            "projected": self.projected,
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any], named: Sequence[str]) -> Self:
        """The same run, without what its methods learned; `named` are the loose files of methods
        that may be run."""
        trace = open_trace(facts["trace"]).without(dict(facts["left_out"]))
        sequences = tuple(facts["sequences"])
        if not all(type(s) is int and s in trace.sequences for s in sequences):
            raise ValueError("it names sequences that its trace does not hold")
        trace.sequences = sequences  # not those that were captured since
        given = facts.get("calibration_from")
        settings = Settings(
            trace,
            Counting.recorded(facts),
            tuple(facts["layers"]),
            tuple(facts["calibration"]),
            None if given is None else GivenCalibration(Path(given[0]), str(given[1])),
        )
        methods = tuple(
            Replayed(recorded_spec(text, named), tuple(topk), protocol=settings.counting.protocol)
            for text, *_, topk in facts["methods"]
        )
        device, locality = torch.device(facts["device"]), facts.get("locality") is True
        return cls(settings, methods, device, locality, facts.get("projected") is True)


class KeptParts:
    """The finished parts of one run in a results folder: a journal of each process that worked on
    it, and `job.json`, which says what run that is."""

    def __init__(self, results: Path, job: Job) -> None:
        self._results = results
        self._job = job
        self._folder = within(within(results, PARTS), job.digest)
        self._journal = Journal(self._folder)

    @classmethod
    def all_in(cls, results: Path, named: Sequence[str]) -> Iterator["KeptParts"]:
        """Those of every run that has parts in a results folder; `named` as in `merge`.

        Raises:
            RetraceError: the trace or a method is not what it was.
        """
        for file in sorted((results / PARTS).glob("*/job.json")):
            job = _job_of(file, named)
            if job.digest != file.parent.name:
                raise RetraceError(
                    f"{file.parent} holds parts of a run over another state of "
                    f"{job.settings.trace.path}, of a method or of retrace: run it again."
                )
            yield cls(results, job)

    @property
    def job(self) -> Job:
        """The run that they are of."""
        return self._job

    def begin(self) -> None:
        """Say which run the parts are of."""
        make_folder(self._folder)
        with written_whole(self._folder / "job.json", writer=this_process()) as opened:
            opened.write(json.dumps(self._job.to_json(), indent=2).encode())

    def load_all(self, tasks: Sequence[Task]) -> dict[Task, Part]:
        """The parts of these tasks that are there, and not damaged."""
        found, wanted = {}, set(tasks)
        for at, arrays in read_journals(self._folder):
            if at in wanted:
                with suppress(ValueError, TypeError, LookupError, RecursionError):
                    found[at] = self._part(arrays, self._job.settings.trace.layer(at[0]))
        return found

    def _part(self, arrays: Arrays, layer: Layer) -> Part:
        """The part that these arrays hold."""
        rules, heads = layer.rules, layer.rules.heads
        projected = self._job.projected and layer.has_output_projection
        tallies = [Tally(method.ks, method.topk) for method in self._job.plan.methods]
        clock = Clock(self._job.device)
        facts = json.loads(arrays.pop("facts").tobytes())
        # Of earlier versions there are none.
        if facts["axes"] != list(AXES) or facts["tailed"] != list(TAILED):
            raise ValueError("Queries are told apart by other axes, or other metrics have tails.")
        for i, tally in enumerate(tallies):
            own = [name for name in arrays if name.startswith(f"{i}.tails.")]
            tails = {name.rpartition(".")[2]: arrays.pop(name) for name in own}
            tally.tails = Tails.checked(len(tally.topk), heads, tails)
            patterns = arrays.pop(f"{i}.patterns", None)
            if (patterns is not None) != (self._job.settings.counting.protocol.block is not None):
                raise ValueError("Patterns of heads are those of blocks of queries.")
            tally.patterns = None if patterns is None else checked_patterns(patterns, heads)
            if projected:
                errors = arrays.pop(f"{i}.projected")
                tally.projected = checked_projected(errors, len(tally.topk))
            if self._job.locality:
                nothing = Locality.empty(len(tally.topk), rules.kv_heads, rules.group)
                counted = (arrays.pop(f"{i}.locality.{of}") for of in KEPT_LOCALITY)
                tally.locality = Locality.checked(nothing, *counted)
        optional = (*AT_POINTS, *AT_BLOCKS, *AT_MARKED)
        for name, array in arrays.items():
            index, kind, of = name.split(".")
            tally = tallies[int(index)]
            known, names, shape = {
                "at_all": (tally.at_all, AT_ALL, (len(tally.ks),)),
                "at_points": (tally.at_points, optional, (len(tally.topk),)),
                "by_bucket": (tally.by_bucket, AXES, (-1, len(tally.topk), len(BUCKETED))),
            }[kind]
            if of not in names or array.dtype != np.float64:
                raise ValueError(f"{name} is none of a tally's.")
            known[of] = Moments(*array.reshape(3, *shape, heads))
            if kind == "by_bucket" and len(known[of].count) > MOST_BUCKETS:
                raise ValueError(f"{name} has more buckets than there are positions for.")
            if kind != "by_bucket" and impossible(of, known[of]).any():
                raise ValueError(f"{name} is of figures that cannot be.")
        for tally, (builds, seconds, state_bytes) in zip(tallies, facts["costs"], strict=True):
            tally.cost = Cost(int(builds), float(seconds), int(state_bytes))
        for step, method, seconds in facts["spent"]:
            clock.seconds[Charge(str(step), method)] = float(seconds)
        return Part(tallies, clock)

    def save(self, task: Task, part: Part) -> None:
        """Keep the part of a task."""
        arrays = {
            f"{i}.{kind}.{of}": np.stack([moments.count, moments.mean, moments.squares])
            for i, tally in enumerate(part.tallies)
            for kind in ("at_all", "at_points", "by_bucket")
            for of, moments in getattr(tally, kind).items()
        }
        for i, tally in enumerate(part.tallies):
            assert tally.tails is not None
            arrays |= {f"{i}.tails.{of}": part for of, part in tally.tails.arrays().items()}
            if (patterns := tally.patterns) is not None:
                arrays[f"{i}.patterns"] = np.stack([*vars(patterns).values()])
            if (errors := tally.projected) is not None:
                arrays[f"{i}.projected"] = np.stack([*vars(errors).values()])
            for of in KEPT_LOCALITY if tally.locality is not None else ():
                arrays[f"{i}.locality.{of}"] = getattr(tally.locality, of)
        facts = {
            "axes": list(AXES),
            "tailed": list(TAILED),
            "costs": [[t.cost.builds, t.cost.seconds, t.cost.state_bytes] for t in part.tallies],
            "spent": [[*charge, seconds] for charge, seconds in part.clock.seconds.items()],
        }
        encoded = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        self._journal.append(task, {"facts": encoded, **arrays})

    def flush(self) -> None:
        """Those that were saved outlive a power cut from here on."""
        self._journal.flush()

    def clear(self) -> None:
        """Remove them."""
        _remove(self._folder)


def counting_of_parts(results: Path) -> Counting | None:
    """Which queries count in the parts that a results folder holds, if in all of them the same."""
    found = set()
    for file in (results / PARTS).glob("*/job.json"):
        with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            found.add(Counting.recorded(read_facts(file)))
    return found.pop() if len(found) == 1 else None


def finished_runs(run: Mapping[str, Any]) -> set[str]:
    """The digests of the runs that are whole in some results, by their facts."""
    digests = (entry.get("whole") for entry in run["history"])
    return {d for d in digests if isinstance(d, str) and re.fullmatch("[0-9a-f]{32}", d)}


def clear_finished(results: Path, run: Mapping[str, Any]) -> None:
    """Remove the parts of every run that is whole in a folder's results: it may have been killed
    before it came to that."""
    for digest in finished_runs(run):
        _remove(within(within(results, PARTS), digest))


def _remove(parts: Path) -> None:
    shutil.rmtree(parts, ignore_errors=True)
    with suppress(OSError):  # other runs have parts there, or there are none
        parts.parent.rmdir()


def _job_of(file: Path, named: Sequence[str]) -> Job:
    """The run that a `job.json` names, which anybody may have written."""
    try:
        return Job.from_json(read_facts(file), named)
    except RetraceError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise RetraceError(
            f"{file} is not as retrace wrote it ({' '.join(str(error).split())}): remove "
            f"{file.parent} and run it again."
        ) from error
