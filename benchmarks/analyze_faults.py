"""What is lost of a run of `analyze` that ends at any moment; part of `faults.py`."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

METHODS = ("exact", "quest:page=8", "sparq", "loki")
TOPK = (2, 8)


def analyze_here(trace: str, out: str, log: str) -> None:
    """One run, in a process of its own; notes in `log` how many units it reports as finished."""
    from retrace.analyze import analyze

    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def show(done: int, total: int) -> None:
        os.write(
            notes, (json.dumps({"done": done, "of": total, "at": time.time()}) + "\n").encode()
        )

    analyze(trace, METHODS, TOPK, out=out, workers=1, progress=show)
    os.write(notes, (json.dumps({"complete": True, "at": time.time()}) + "\n").encode())


class Runs:
    """Runs over copies of one trace, each in a process that has everything imported already."""

    def __init__(self, folder: Path, trace: Path) -> None:
        self.folder, self.trace = folder, trace
        folder.mkdir()
        self._processes = multiprocessing.get_context("forkserver")

    def begin(self, name: str) -> Path:
        """A copy of the trace, beside which exact answers and calibrations will be kept."""
        place = self.folder / name
        place.mkdir()
        shutil.copytree(self.trace, place / "t.zarr")
        return place

    def run(self, place: Path, kill_after: float | None = None) -> list[dict[str, Any]]:
        """What a run noted until it ended, or was ended after so many seconds."""
        log = place / "log"
        log.unlink(missing_ok=True)
        arguments = (str(place / "t.zarr"), str(place / "r"), str(log))
        process = self._processes.Process(target=analyze_here, args=arguments)
        process.start()
        process.join(kill_after)
        process.kill()
        process.join()
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def kills(runs: Runs, count: int) -> dict[str, Any]:
    """Runs killed, each at its own moment, and gone on with."""
    runs.run(runs.begin("warm"))  # what only the first run waits for
    place, begun = runs.begin("whole"), time.time()
    noted = runs.run(place)
    seconds, units = noted[-1]["at"] - begun, noted[0]["of"]
    whole = (place / "r" / "metrics.parquet").read_bytes()
    rng, outcomes = random.Random(2), []
    for index in range(count):
        place = runs.begin(f"killed-{index}")
        noted = runs.run(place, kill_after=seconds * (index + rng.random()) / count)
        reported = max((line.get("done", 0) for line in noted), default=0)
        resumed = runs.run(place)
        kept = next((line["done"] for line in resumed if "done" in line), units)
        again = (place / "r" / "metrics.parquet").read_bytes()
        outcomes.append(
            {
                "reported": reported,
                "lost": max(0, reported - kept),
                "same": bool(resumed) and "complete" in resumed[-1] and again == whole,
                "left": sorted(f.name for f in (place / "r").iterdir() if f.name[0] == "."),
            }
        )
        shutil.rmtree(place)
    return {"seconds": seconds, "units": units, "outcomes": outcomes}


def deaths(runs: Runs, workers: int, every: float) -> dict[str, Any]:
    """A run of so many worker processes, of which one is killed every so many seconds."""
    from retrace.analyze import analyze
    from retrace.analyze.processes import Processes

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
    whole = (runs.folder / "whole" / "r" / "metrics.parquet").read_bytes()
    same = (place / "r" / "metrics.parquet").read_bytes() == whole
    return {"killed": killed, "missing": len(found.run["missing"]), "same": same}


def report(found: dict[str, Any], died: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The figures in Markdown."""
    outcomes = found["outcomes"]
    reported = [outcome["reported"] for outcome in outcomes]
    lines = [
        "",
        f"`analyze` of {', '.join(METHODS)} at {len(TOPK)} budgets, {found['units']} units (a "
        f"layer of a sequence), {found['seconds']:.1f} s when it is left alone, exact answers kept "
        "beside the trace:",
        "",
        "| fault | runs | units reported as finished | of those, lost | runs that left something "
        "unfinished | gone on with to the same metrics.parquet |",
        "|---|---:|---|---:|---:|---:|",
        f"| kill -9 | {len(outcomes)} | {min(reported)} to {max(reported)} "
        f"| {sum(o['lost'] for o in outcomes)} | {sum(bool(o['left']) for o in outcomes)} "
        f"| {sum(o['same'] for o in outcomes)} |",
        "",
        "| workers | killed meanwhile | units missing | same metrics.parquet as one worker |",
        "|---|---:|---:|---|",
    ]
    lines += [
        f"| {name} | {d['killed']} | {d['missing']} | {'yes' if d['same'] else 'NO'} |"
        for name, d in died
    ]
    return lines
