"""What is lost of a capture that ends at any moment, and what is noticed of damage."""

import contextlib
import hashlib
import itertools
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults import processes
from benchmarks.faults.mounts import small_disk
from benchmarks.faults.processes import Notes
from benchmarks.tiny_models import TEXT, save_tiny_model

SEQUENCES = 12
LENGTH = 200


def section(captures: "Captures", count: int) -> list[str]:
    """Captures that end early, and chunks that are spoilt."""
    trace, begun = captures.folder / "whole", time.time()
    noted = captures.run(trace)
    assert noted[-1]["stage"] == "complete", noted
    seconds, whole = noted[-1]["at"] - begun, digest(trace)
    size = sum(f.stat().st_size for f in trace.rglob("*") if f.is_file())
    rows = {
        "kill -9": kills(captures, whole, seconds, count),
        "full disk (tmpfs)": full_disks(captures, whole, size),
        "no larger file (RLIMIT_FSIZE)": small_files(captures, whole),
        "another capture is writing": rivals(captures, whole, 3),
    }
    return report(rows, spoils(trace, 2 * count), seconds, size)


def capture_here(folder: Path, trace: Path, log: Path, resume: bool, fault: dict[str, Any]) -> None:
    """One capture, in a process of its own; notes in `log` what it reports as finished."""
    from retrace.capture import capture
    from retrace.traces import RetraceError

    if "file_bytes" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_bytes"], fault["file_bytes"]))
    note = partial(processes.note, log)

    def show(progress: Any) -> None:
        note(stage=progress.stage, sequences=progress.sequences)
        if progress.sequences >= fault.get("fills_after", SEQUENCES + 1):
            fill(trace.parent / "filler")

    try:
        capture(
            str(folder / "model"),
            text=[folder / "text.txt"],
            limit=SEQUENCES,
            max_length=LENGTH,
            out=trace,
            resume=resume,
            progress=show,
        )
        note(stage="complete", sequences=SEQUENCES)
    except RetraceError as error:
        note(stage="refused", line=str(error))


def fill(file: Path) -> None:
    """Leave no room on a disk."""
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as filler:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"\0" * size)


class Captures:
    """Captures of one model, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.text, self.first = (folder / n for n in ("model", "text.txt", "first"))
        save_tiny_model("mistral", self.model)
        self.text.write_text(TEXT * 3)
        self._numbers = itertools.count()
        self.run(self.first)  # what only the first run waits for

    def run(
        self, trace: Path, *, resume: bool = False, kill_after: float | None = None, **fault: Any
    ) -> Notes:
        """What a capture noted until it ended, or was ended after so many seconds."""
        log = self.folder / f"log-{next(self._numbers)}"
        process = processes.begin(capture_here, self.folder, trace, log, resume, fault)
        processes.end(process, kill_after)
        return processes.noted(log)


def digest(trace: Path) -> str:
    """Of every file but the trace's own attributes, which hold the time."""
    known = hashlib.sha256()
    for file in sorted(trace.rglob("*")):
        if file.is_file() and file.parent != trace:
            known.update(f"{file.relative_to(trace)} ".encode() + file.read_bytes())
    return known.hexdigest()


def check_after(captures: Captures, trace: Path, noted: Notes, whole: str) -> dict[str, Any]:
    """What an interrupted capture left, and whether it goes on to the same bytes."""
    from retrace.traces import verify_trace

    reported = max((line.get("sequences", 0) for line in noted), default=0)
    found = verify_trace(trace) if trace.exists() else None
    finished = 0 if found is None else len(found.finished)
    partial = sum(1 for _ in trace.rglob("*.partial"))
    resumed = captures.run(trace, resume=True)
    return {
        "stage": noted[-1]["stage"] if noted else "starting",
        "finished": finished,
        "lost": max(0, reported - finished),
        "damaged": 0 if found is None else len(found.damages),
        "partial": partial,
        "resumed": bool(resumed) and resumed[-1]["stage"] == "complete" and digest(trace) == whole,
        "line": next((line["line"] for line in noted if "line" in line), None),
    }


def tried(captures: Captures, trace: Path, whole: str, **fault: Any) -> dict[str, Any]:
    """What came of a capture that met a fault, and of going on with it; the trace is removed."""
    noted = captures.run(trace, **fault)
    outcome = check_after(captures, trace, noted, whole)
    shutil.rmtree(trace, ignore_errors=True)
    return outcome


def kills(captures: Captures, whole: str, seconds: float, count: int) -> list[dict[str, Any]]:
    """Captures that were killed, each at its own moment of a run's `seconds`."""
    rng, outcomes = random.Random(0), []
    for index in range(count):
        trace = captures.folder / f"killed-{index}"
        # One in each equal part of the time, so that no stage is missed.
        moment = seconds * (index + rng.random()) / count
        outcomes.append(tried(captures, trace, whole, kill_after=moment))
    return outcomes


def full_disks(captures: Captures, whole: str, size: int) -> list[dict[str, Any]]:
    """Captures whose disk was filled by another program after some sequences."""
    outcomes = []
    disk = captures.folder / "disk"
    with small_disk(disk, 4 * size) as there:
        for after in range(0, SEQUENCES, 2) if there else ():
            noted = captures.run(disk / "t", fills_after=after)
            (disk / "filler").unlink(missing_ok=True)
            outcomes.append(check_after(captures, disk / "t", noted, whole))
            shutil.rmtree(disk / "t", ignore_errors=True)
    return outcomes


def small_files(captures: Captures, whole: str) -> list[dict[str, Any]]:
    """Captures that may write no file larger than some size (RLIMIT_FSIZE)."""
    return [
        tried(captures, captures.folder / f"small-{size}", whole, file_bytes=size)
        for size in (4_000, 8_000, 15_000, 20_000)
    ]


def rivals(captures: Captures, whole: str, count: int) -> list[dict[str, Any]]:
    """Captures into the trace that another one is writing, which goes on."""
    outcomes = []
    for index in range(count):
        trace = captures.folder / f"rivals-{index}"
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(captures.run, trace)
            while not trace.exists():
                time.sleep(0.01)
            noted = captures.run(trace, resume=True)
            first.result()
        outcomes.append(check_after(captures, trace, noted, whole))
        shutil.rmtree(trace, ignore_errors=True)
    return outcomes


def spoils(trace: Path, count: int) -> Counter[str]:
    """How often `verify_trace` named the very file that was spoilt, and no other, by kind."""
    from retrace.traces import bundles_of, open_trace, verify_trace

    known = open_trace(trace)
    sharing = bundles_of(known.planned, known.bundle)
    rng, named = random.Random(1), Counter[str]()
    chunks = sorted(f for f in trace.rglob("*") if f.is_file() and f.name != "zarr.json")
    # A mark that is gone means that its sequence was never finished.
    chunks = [file for file in chunks if "done" not in file.parts]
    for index in range(count):
        file, kind = rng.choice(chunks), ("flipped bit", "cut short", "deleted")[index % 3]
        before = file.read_bytes()
        if kind == "deleted":
            file.unlink()
        elif kind == "cut short":
            file.write_bytes(before[: rng.randrange(len(before))])
        else:
            spoilt = bytearray(before)
            spoilt[rng.randrange(len(before))] ^= 1 << rng.randrange(8)
            file.write_bytes(spoilt)
        parts = file.relative_to(trace).parts
        array, number = "/".join(parts[: parts.index("c")]), int(parts[parts.index("c") + 1])
        found = verify_trace(trace).damages
        named_sequences = {d.sequence for d in found}
        right = named_sequences == {*sharing[number]} and array in {d.array for d in found}
        if kind == "flipped bit" and array.startswith("layers"):
            # In one sequence's chunk, unless it is in the shard's index.
            right = right or (len(named_sequences) == 1 and named_sequences <= {*sharing[number]})
        # What reads the length of a sequence cannot do so without it.
        if array != "length" and {d.array for d in found} != {array}:
            right = False
        named[f"{kind}: {'named' if right else 'missed'}"] += 1
        file.write_bytes(before)
    assert verify_trace(trace).whole
    return named


def report(
    rows: dict[str, list[dict[str, Any]]], named: Counter[str], seconds: float, size: int
) -> list[str]:
    """The figures in Markdown."""
    lines = [
        f"`capture` of a random model of 2 layers over {SEQUENCES} sequences of {LENGTH} tokens, "
        f"{size / 1e6:.1f} MB, {seconds:.1f} s when it is left alone:",
        "",
        "| fault | captures | ended while | finished sequences left | of those reported, lost | "
        "damaged arrays | unfinished files left | resumed to the same bytes |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for fault, outcomes in rows.items():
        if not outcomes:
            lines.append(f"| {fault} | 0 | (not to be had on this machine) | | | | | |")
            continue
        stages = Counter(outcome["stage"] for outcome in outcomes)
        finished = [outcome["finished"] for outcome in outcomes]
        cells = [
            fault,
            str(len(outcomes)),
            ", ".join(f"{stage} {count}" for stage, count in stages.most_common()),
            f"{min(finished)} to {max(finished)}",
            str(sum(outcome["lost"] for outcome in outcomes)),
            str(sum(outcome["damaged"] for outcome in outcomes)),
            str(sum(outcome["partial"] for outcome in outcomes)),
            str(sum(outcome["resumed"] for outcome in outcomes)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| one chunk spoilt | times | named, and nothing else |", "|---|---:|---:|"]
    for kind in ("flipped bit", "cut short", "deleted"):
        right, wrong = named[f"{kind}: named"], named[f"{kind}: missed"]
        lines.append(f"| {kind} | {right + wrong} | {right} |")
    said = Counter(
        _placeless(o["line"]) for outcomes in rows.values() for o in outcomes if o["line"]
    )
    lines += ["", "What the captures said that could still say something:", ""]
    for line, count in said.most_common():
        lines.append(f"- {count} times: {line}")
    return lines


def _placeless(line: str) -> str:
    """A line with names of temporary folders left out."""
    return " ".join(
        f"TRACE{':' * word.endswith(':')}" if word.startswith(tempfile.gettempdir()) else word
        for word in line.split()
    )
