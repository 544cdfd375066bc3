"""What is lost of a run of `analyze` that ends at any moment, or whose workers do."""

import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults import processes
from benchmarks.faults.capture import Captures
from benchmarks.faults.mounts import enlarge, small_disk
from benchmarks.faults.processes import Notes

METHODS = ("exact", "quest:page=8", "sparq", "loki")
TOPK = (2, 8)


def section(captures: Captures, count: int) -> list[str]:
    """Runs of `analyze` that end early, or whose workers do."""
    runs = Runs(captures.folder / "analyze-runs", captures.first)
    found = {
        f"kill -9, {workers} worker{'s' * (workers > 1)}": kills(runs, count, workers)
        for workers in (1, 4)
    }
    found["full disk (tmpfs)"] = full_disks(runs)
    died = [("4, one killed every 3 seconds", deaths(runs, workers=4, every=3))]
    return report(runs, found, died)


def analyze_here(trace: Path, out: Path, log: Path, settings: dict[str, Any]) -> None:
    """One run, in a process of its own; notes in `log` how many units it reports as finished."""
    from retrace.analyze import analyze
    from retrace.traces import RetraceError

    note = partial(processes.note, log)

    def show(done: int, total: int) -> None:
        note(done=done, of=total)

    try:
        analyze(trace, METHODS, TOPK, out=out, progress=show, **{"workers": 1, **settings})
        note(complete=True)
    except (RetraceError, OSError) as error:
        note(line=str(error))


class Runs:
    """Runs over copies of one trace, each in a process of its own."""

    def __init__(self, folder: Path, trace: Path) -> None:
        self.folder, self.trace = folder, trace
        folder.mkdir()
        self.run(self.begin("warm"))  # what only the first run waits for
        place, begun = self.begin("whole"), time.time()
        noted = self.run(place)
        self.seconds: float = noted[-1]["at"] - begun
        self.units: int = noted[0]["of"]
        self.whole = (place / "r" / "metrics.parquet").read_bytes()

    def begin(self, name: str) -> Path:
        """A copy of the trace, beside which exact answers and calibrations will be kept."""
        place = self.folder / name
        place.mkdir()
        shutil.copytree(self.trace, place / "t.zarr")
        return place

    def run(
        self,
        place: Path,
        *,
        kill_after: float | None = None,
        kill_when: tuple[int, float] | None = None,
        **settings: Any,
    ) -> Notes:
        """What a run noted until it ended, or was ended: after so many seconds, or so many seconds
        after it has finished so many units."""
        (place / "log").unlink(missing_ok=True)
        names = (place / name for name in ("t.zarr", "r", "log"))
        process = processes.begin(analyze_here, *names, settings)
        if kill_when is not None:
            units, kill_after = kill_when
            while process.is_alive() and self.finished(place) < units:
                time.sleep(0.01)
        processes.end(process, kill_after)
        return processes.noted(place / "log")

    def finished(self, place: Path) -> int:
        """How many units the last run has reported as finished; -1 before it begins with them."""
        notes = processes.noted(place / "log")
        return max((line.get("done", -1) for line in notes), default=-1)

    def counts(self, noted: Notes, resumed: Notes) -> dict[str, int]:
        """Units that a run had reported as finished, and of these, those that the next did anew."""
        reported = max((line.get("done", 0) for line in noted), default=0)
        kept = next((line["done"] for line in resumed if "done" in line), self.units)
        return {"reported": reported, "lost": max(0, reported - kept)}


def kills(runs: Runs, count: int, workers: int) -> list[dict[str, Any]]:
    """Runs killed, each at its own moment, and gone on with by one worker."""
    rng, outcomes = random.Random(2), []
    for index in range(count):
        place = runs.begin(f"killed-{index}")
        part = (index + rng.random()) / count  # one in each equal part, so that none is missed
        if workers == 1:
            noted = runs.run(place, kill_after=runs.seconds * part)
        else:  # most of their time is that of processes which start
            moment = int(runs.units * part), rng.random() / 5
            noted = runs.run(place, kill_when=moment, workers=workers)
        outcomes.append(check_after(runs, place, noted))
        shutil.rmtree(place)
    return outcomes


def full_disks(runs: Runs) -> list[dict[str, Any]]:
    """Runs whose results folder is a disk that is too small, gone on with when there is room."""
    outcomes = []
    for pages in (1, 4, 8, 16, 32, 48):
        place = runs.begin(f"full-{pages}")
        with small_disk(place / "r", pages * 4096) as there:
            if there:
                noted = runs.run(place)
                enlarge(place / "r", 1 << 26)
                outcomes.append(check_after(runs, place, noted))
    return outcomes


def check_after(runs: Runs, place: Path, noted: Notes) -> dict[str, Any]:
    """What an interrupted run left, and whether one worker goes on to the same figures."""
    resumed = runs.run(place)
    return {
        **runs.counts(noted, resumed),
        "same": (place / "r" / "metrics.parquet").read_bytes() == runs.whole,
        "left": sorted(f.name for f in (place / "r").iterdir() if f.name[0] == "."),
    }


def deaths(runs: Runs, workers: int, every: float) -> dict[str, Any]:
    """A run of so many worker processes, of which one is killed every so many seconds."""
    from retrace.analyze import analyze
    from retrace.analyze.workers.processes import Processes

    rng, over, killed = random.Random(3), threading.Event(), 0
    place = runs.begin("deaths")

    def kill() -> None:
        nonlocal killed
        while not over.wait(every):
            os.kill(rng.choice(sorted(pool.pids)), signal.SIGKILL)
            killed += 1

    with Processes(workers) as pool:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            found = analyze(place / "t.zarr", METHODS, TOPK, out=place / "r", executor=pool)
        finally:
            over.set()
            killer.join()
    same = (place / "r" / "metrics.parquet").read_bytes() == runs.whole
    return {"killed": killed, "missing": len(found.run["missing"]), "same": same}


def report(
    runs: Runs, found: dict[str, list[dict[str, Any]]], died: list[tuple[str, dict[str, Any]]]
) -> list[str]:
    """The figures in Markdown."""
    lines = [
        f"`analyze` of {', '.join(METHODS)} at {len(TOPK)} budgets, {runs.units} units (a layer of "
        f"a sequence), {runs.seconds:.1f} s when it is left alone, exact answers kept beside the "
        "trace:",
        "",
        "| fault | runs | units reported as finished | of those, lost | runs that left something "
        "unfinished | gone on with to the same metrics.parquet |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for fault, outcomes in found.items():
        reported = [outcome["reported"] for outcome in outcomes]
        lines.append(
            f"| {fault} | {len(outcomes)} "
            f"| {min(reported)} to {max(reported)} | {sum(o['lost'] for o in outcomes)} "
            f"| {sum(bool(o['left']) for o in outcomes)} | {sum(o['same'] for o in outcomes)} |"
        )
    lines += [
        "",
        "| workers | killed meanwhile | units missing | same metrics.parquet as one worker |",
        "|---|---:|---:|---|",
    ]
    lines += [
        f"| {name} | {d['killed']} | {d['missing']} | {'yes' if d['same'] else 'NO'} |"
        for name, d in died
    ]
    return lines
