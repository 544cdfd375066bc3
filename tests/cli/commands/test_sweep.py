"""`retrace sweep`: as `analyze`, over one exact pass; killed, it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from retrace.analyze import Results
from retrace.analyze.replay import engine as replay
from retrace.analyze.storage.journal import read_journals

Run = Callable[..., Result]
SWEEP = """
topk: [2, 5]
no-plots: true
no-cache: true
workers: 1
method:
  - exact
  - quest: {page: [2, 4], pool: [none, sum]}
"""
QUIET = ("--no-plots", "--no-cache", "--workers", "1")
TABLES = ("metrics.parquet", "curves.parquet", "sequences.parquet", "table.md")


@pytest.fixture
def sweep(place: Path) -> Path:
    """Five methods at two budgets."""
    path = Path("sweep.yaml")
    path.write_text(SWEEP)
    return path


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ranks each exact pass over a block found."""
    made: list[int] = []
    exact_pass = replay.exact_pass

    def counted(block: Any, ranks: int) -> Any:
        made.append(ranks)
        return exact_pass(block, ranks)

    monkeypatch.setattr(replay, "exact_pass", counted)
    return made


def test_the_same_bytes_as_analyze_over_one_exact_pass(
    run: Run, trace: Path, sweep: Path, passes: list[int]
) -> None:
    run("analyze", trace, "--method", "exact", "--topk", "5", *QUIET, "--out", "one")
    of_one_method = list(passes)
    passes.clear()
    run("sweep", trace, sweep, "--out", "swept")
    assert passes == of_one_method != []
    grid = "quest:page={2,4},pool={none,sum}"
    options = ("--method", "exact", "--method", grid, "--topk", "2,5", *QUIET)
    run("analyze", trace, *options, "--out", "analyzed")
    for name in TABLES:
        assert Path("swept", name).read_bytes() == Path("analyzed", name).read_bytes()
    assert len(Results.load("swept").methods()) == 5


def test_a_file_that_has_grown(run: Run, trace: Path, sweep: Path) -> None:
    run("sweep", trace, sweep)
    before = Results.load("results/tiny").run["history"]
    run("sweep", trace, sweep)
    assert Results.load("results/tiny").run["history"] == before  # nothing was left to do
    sweep.write_text(f"{SWEEP}  - window\n")
    run("sweep", trace, sweep)
    grown = Results.load("results/tiny")
    assert grown.methods()[-1] == "window"
    assert len(grown.run["history"]) == len(before) + 1


def test_flags_and_environment_are_stronger(run: Run, trace: Path, sweep: Path) -> None:
    asked = ("--topk", "3", "--format", "json")
    rows = json.loads(run("sweep", trace, sweep, *asked, env={"RETRACE_SWEEP_LAYERS": "1"}).stdout)
    assert {row["topk"] for row in rows} == {3}
    assert {row["layer"] for row in rows} == {1}


def test_what_it_will_take(run: Run, trace: Path, sweep: Path) -> None:
    cost = json.loads(run("sweep", trace, sweep, "--dry-run", "--format", "json").stdout)
    assert cost["tasks"] == 6
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "sweep.yaml cannot be read"),
        ("methods: exact", "no setting 'methods'. Did you mean method?"),
        ("config: other.yaml", "no setting 'config'"),
        ("method: {qest: {page: [2]}}", "Did you mean quest?"),
        ("method: {quest: {pages: [2]}}", "Did you mean page"),
        ("method: {quest: {page: [2, x]}}", "expected int"),
        ("topk: [2, many]", "neither a number nor a range"),
        ("method: [", "cannot be read as YAML"),
    ],
    ids=["none", "setting", "file", "method", "parameter", "value", "budget", "yaml"],
)
def test_mistakes(run: Run, trace: Path, text: str | None, words: str) -> None:
    if text is not None:
        Path("sweep.yaml").write_text(text)
    result = run("sweep", trace, "sweep.yaml", code=2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert words in line and result.stderr.endswith(f"{line}\n")
    assert not result.stdout


def test_a_file_is_asked_for(run: Run, trace: Path) -> None:
    assert "Missing argument 'FILE.yaml'" in run("sweep", trace, code=2).stderr


SLOW = """
import time
from dataclasses import dataclass

from retrace.analyze import ScoreMethod

@dataclass(frozen=True)
class Slow(ScoreMethod):
    slope: float = 1.0

    def build(self, past):
        with open("built", "a") as log:
            log.write(f"{past.group.layer}.{past.group.sequence}\\n")
        time.sleep(0.05)
        return past.keys.norm(dim=-1) * self.slope

    def scores(self, state, queries, positions):
        return state.expand(*queries.shape[:2], -1)
"""


def _kept(results: Path) -> list[tuple[int, int]]:
    """Layer and sequence of each part of a run that is under way."""
    return [at for folder in results.glob(".parts/*") for at, _ in read_journals(folder)]


def test_killed_and_gone_on_with(run: Run, trace: Path, sweep: Path) -> None:
    Path("slow.py").write_text(SLOW)
    sweep.write_text(f"{SWEEP}  - ./slow.py:Slow: {{slope: [1, -1]}}\n")
    run("sweep", trace, sweep, "--out", "undisturbed")
    command = [sys.executable, "-m", "retrace.cli", "sweep", trace, sweep, "--out", "killed"]
    killed = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(kept := _kept(Path("killed"))) < 2 and killed.poll() is None:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    said = killed.communicate()[1].decode()
    assert killed.returncode == -signal.SIGKILL, said
    assert not Path("killed/metrics.parquet").exists()
    Path("built").unlink()
    run("sweep", trace, sweep, "--out", "killed")
    built = set(Path("built").read_text().split())
    # The first unit is answered again, to see that no method knows the future.
    assert built.isdisjoint({f"{layer}.{sequence}" for layer, sequence in kept} - {"0.0"})
    assert len(kept) == 2 and len(built) >= 3
    for name in TABLES:
        assert Path("killed", name).read_bytes() == Path("undisturbed", name).read_bytes()
    assert not Path("killed/.parts").exists()
