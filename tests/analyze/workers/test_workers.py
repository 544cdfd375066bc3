"""Any number of workers, killed or not, comes to the same bytes; what is finished is kept."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import Results, analyze, merge
from retrace.analyze.replay import engine as replay
from retrace.analyze.units.unit import Unit
from retrace.analyze.workers.processes import Processes, WorkerDied
from retrace.traces import RetraceError, Trace

pytestmark = pytest.mark.usefixtures("untried")
MakeTrace = Callable[..., Trace]
TASKS = 6
"""Three layers of the two sequences that are not for calibration."""

PROBE = """
import os, signal, time
from pathlib import Path
from retrace.traces import RetraceError

FOLDER = Path({folder!r})
HERE = {here}

@dataclass(frozen=True)
class Probe(ScoreMethod):
    slope: float = 1.0

    def build(self, past):
        at = past.group.layer, past.group.sequence
        if past.group.kv_head == 0:
            with (FOLDER / "log").open("a") as log:
                log.write(f"{{at[0]}}.{{at[1]}} {{os.getpid()}}\\n")
        if at == (1, 1):
            {fault}
        return past.keys.norm(dim=-1) * self.slope

    def scores(self, state, queries, positions):
        return state.expand(*queries.shape[:2], -1)
"""
KILL_ONCE = """if not (FOLDER / "once").exists():
                (FOLDER / "once").touch()
                os.kill(os.getpid(), signal.SIGKILL)"""
KILL = "os.getpid() == HERE or os.kill(os.getpid(), signal.SIGKILL)"
PLACE = r"mine\.py:Probe build\(\) at layer 1, head 0, sequence 1, position \d+"
SLOW = "pass\n        time.sleep(0.3)"


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Three layers, three sequences."""
    return make_trace([rules(heads=4), rules(window=9), rules(sinks=(0.5, -1.0))], [53, 24, 40])


@pytest.fixture
def probe(write_methods: Any, tmp_path: Path) -> Callable[..., str]:
    """A method that logs what it is built for, and has a fault in layer 1 of sequence 1."""

    def spec(fault: str = "pass", name: str = "mine.py") -> str:
        text = PROBE.format(folder=str(tmp_path), fault=fault, here=os.getpid())
        return f"{write_methods(text, name)}:Probe"

    return spec


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[str]]:
    """What was built since this was last asked, layer.sequence."""
    path = tmp_path / "log"

    def read() -> list[str]:
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]

    return read


def run(trace: Trace, spec: str, out: Path | None, **settings: Any) -> Results:
    """Four methods at two budgets."""
    methods = ["exact", "quest:page=4", "loki", spec]
    return analyze(
        trace, methods, [2, 5], out=out, min_context=10, **{"keep_exact": False, **settings}
    )


def figures(folder: Path) -> dict[str, bytes]:
    """The bytes of the tables of a results folder that is complete."""
    assert not (folder / ".parts").exists()
    names = ("metrics.parquet", "curves.parquet", "positions.parquet", "tails.parquet")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def folder_of_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that asks has one worker's results written."""
    return tmp_path_factory.mktemp("one") / "r"


@pytest.fixture
def one(
    trace: Trace, probe: Any, tmp_path: Path, log: Any, folder_of_one: Path
) -> dict[str, bytes]:
    """What one worker comes to, in a folder of the test's own; computed once for all tests."""
    if not folder_of_one.exists():
        run(trace, probe(), folder_of_one, workers=1)
        log()
    shutil.copytree(folder_of_one, tmp_path / "one")
    return figures(tmp_path / "one")


@pytest.mark.parametrize("count", [1, 3])
def test_any_executor(trace: Trace, probe: Any, tmp_path: Path, one: Any, count: int) -> None:
    with ThreadPoolExecutor(count) as executor:
        run(trace, probe(), tmp_path / "r", executor=executor)
    assert figures(tmp_path / "r") == one


def test_workers_that_are_killed(trace: Trace, probe: Any, tmp_path: Path, one: Any) -> None:
    """Of two workers, one is killed time after time in the middle of its unit."""
    killed: set[str] = set()
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.02) and len(killed) < 2:
            path = tmp_path / "log"
            lines = path.read_text().splitlines() if path.exists() else []
            for at, pid in (line.split() for line in lines if line[-1:].isdigit()):
                if at not in killed and int(pid) in executor.pids:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.add(at)
                    break

    with Processes(2) as executor:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            run(trace, probe(SLOW), tmp_path / "r", executor=executor)
        finally:
            over.set()
            killer.join()
    assert len(killed) > 1
    assert figures(tmp_path / "r") == one


def test_a_death_costs_one_unit(
    trace: Trace, probe: Any, tmp_path: Path, one: Any, log: Any
) -> None:
    told: list[tuple[int, int]] = []
    spec = probe(KILL_ONCE)
    results = run(trace, spec, tmp_path / "r", workers=2, progress=lambda *at: told.append(at))
    assert figures(tmp_path / "r") == one
    assert told == [(done, TASKS) for done in range(TASKS + 1)]
    pids = {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}
    assert pids and str(os.getpid()) not in pids
    profile = results.run["history"][0]["profile"]
    assert profile["workers"] == 2
    assert 0 < results.profile()["Seconds"].sum() <= 2 * profile["wall"] * 1.001
    built = log()
    assert built.count("1.1") == 2
    assert {built.count(at) for at in ("0.0", "0.1", "1.0", "2.0", "2.1")} == {1}


def test_a_unit_that_kills_its_workers(
    trace: Trace,
    probe: Any,
    tmp_path: Path,
    one: Any,
    log: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = probe(KILL)
    results = run(trace, spec, tmp_path / "r", workers=2)
    assert (
        "Layer 1 of sequence 1 is missing: a worker was killed by SIGKILL, 3 times" in caplog.text
    )
    assert log().count("1.1") == 3
    [missing] = results.run["missing"]
    assert (missing["layer"], missing["sequence"]) == (1, 1)
    assert missing["methods"]["quest:page=4"] == [2, 5]
    whole, cut = (
        Results.load(tmp_path / name).metrics.set_index(
            ["method", "layer", "head", "topk", "metric"]
        )
        for name in ("one", "r")
    )
    assert (whole.index == cut.index).all()
    fewer = cut["count"] < whole["count"]
    assert set(fewer[fewer].index.get_level_values("layer")) == {1}
    # The same command, once the cause is gone, goes on with what is missing.
    run(trace, spec, tmp_path / "r", workers=1)
    assert log() == ["1.1"]
    assert figures(tmp_path / "r") == one
    assert Results.load(tmp_path / "r").run["missing"] == []


@pytest.mark.parametrize("times", [1, 3])
def test_a_disk_that_is_away(
    trace: Trace,
    probe: Any,
    tmp_path: Path,
    one: Any,
    log: Any,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
) -> None:
    """Reading fails in the middle of a layer: it is replayed again, three times in all."""
    load, failed = replay.load_units, []

    def load_some(layer: Any, sequence: int, *rest: Any) -> Iterator[Unit]:
        units = load(layer, sequence, *rest)
        unit = next(units)
        yield unit
        if (unit.group.layer, sequence) == (1, 1) and len(failed) < times:
            failed.append(sequence)
            raise OSError("the disk was away")
        yield from units

    monkeypatch.setattr(replay, "load_units", load_some)
    if times == 1:
        run(trace, probe(), tmp_path / "r", workers=1)
        assert figures(tmp_path / "r") == one
        assert log().count("1.1") == 2
    else:
        with pytest.raises(OSError, match="the disk was away"):
            run(trace, probe(), tmp_path / "r", workers=1)
        assert log().count("1.1") == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("1 / 0", PLACE + " raised ZeroDivisionError: division by zero"),
        ('raise OSError("no such file")', PLACE + " raised OSError: no such file"),
        ('raise RetraceError("no such luck")', "no such luck"),
    ],
)
def test_errors_of_a_method(
    trace: Trace, probe: Any, tmp_path: Path, log: Any, fault: str, message: str
) -> None:
    """The user can mend it: told at once, without another attempt."""
    with pytest.raises(RetraceError, match=message):
        run(trace, probe(fault), tmp_path / "r", workers=1)
    assert log().count("1.1") == 1


def test_errors_in_a_process(trace: Trace, probe: Any, tmp_path: Path) -> None:
    with (
        Processes(1) as executor,
        pytest.raises(RetraceError, match=PLACE + " raised ZeroDivisionError") as caught,
    ):
        run(trace, probe("1 / 0"), tmp_path / "bug", executor=executor)
    assert "mine.py" in "".join(caught.value.__notes__)  # where it happened


SCRIPT = """
import os, signal, sys
from retrace.analyze import analyze

def die(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

analyze(
    sys.argv[1], ["exact", "quest:page=4", "loki", sys.argv[2]], [2, 5], out=sys.argv[3],
    min_context=10, keep_exact=False, workers=int(sys.argv[4]), progress=die,
)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_without_warning(
    trace: Trace, probe: Any, tmp_path: Path, one: Any, log: Any, workers: int
) -> None:
    arguments = [str(trace.path), probe(), str(tmp_path / "r"), str(workers)]
    killed = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "r" / "run.json").exists()
    log()
    told: list[tuple[int, int]] = []
    run(trace, probe(), tmp_path / "r", workers=1, progress=lambda *at: told.append(at))
    assert told[0] == (3, TASKS)
    assert len(set(log())) == TASKS - 3
    assert figures(tmp_path / "r") == one


def interrupt(trace: Trace, spec: str, out: Path, **settings: Any) -> None:
    """Ctrl-C after two parts."""

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(trace, spec, out, workers=1, progress=stop, **settings)


def test_interrupted(trace: Trace, probe: Any, tmp_path: Path, one: Any, log: Any) -> None:
    interrupt(trace, probe(), tmp_path / "r")
    log()
    run(trace, probe(), tmp_path / "r", workers=1)
    assert set(log()) == {"1.0", "1.1", "2.0", "2.1"}
    assert figures(tmp_path / "r") == one


def test_exact_answers_kept_meanwhile_change_nothing(
    make_trace: MakeTrace, rules: Any, probe: Any, tmp_path: Path
) -> None:
    # Not on a grid, where products are exact in whatever order they are summed.
    draw = np.random.default_rng(0).normal
    tensors = {
        (layer, s): tuple(draw(size=(2, length, 8)) for _ in range(3))
        for layer in (0, 1)
        for s, length in enumerate((153, 124, 140))
    }
    traces = [
        make_trace([rules(), rules()], (153, 124, 140), tensors=tensors, name=name)
        for name in ("a", "b")
    ]
    run(traces[0], probe(), tmp_path / "a", keep_exact=True)
    interrupt(traces[1], probe(), tmp_path / "b", keep_exact=True)
    analyze(traces[1], ["exact", "window"], [5])  # keeps them all
    run(traces[1], probe(), tmp_path / "b", keep_exact=True)
    assert figures(tmp_path / "b") == figures(tmp_path / "a")


@pytest.mark.parametrize("change", ["settings", "method", "file"])
def test_parts_of_another_run_are_not_used(
    trace: Trace, probe: Any, tmp_path: Path, log: Any, change: str
) -> None:
    interrupt(
        trace, probe(), tmp_path / "r", **({"layers": [0, 1]} if change == "settings" else {})
    )
    log()
    spec = probe("time.sleep(0)") if change == "file" else probe()
    run(trace, spec + (":slope=2" if change == "method" else ""), tmp_path / "r", workers=1)
    assert len(set(log())) == TASKS


def test_damaged_parts_are_replayed(trace: Trace, probe: Any, tmp_path: Path, one: Any) -> None:
    interrupt(trace, probe(), tmp_path / "r")
    (kept,) = (tmp_path / "r" / ".parts").glob("*/*.journal")
    whole = bytearray(kept.read_bytes())
    whole[len(whole) // 4] ^= 1  # of the first of two
    kept.write_bytes(whole[:-1])
    told: list[tuple[int, int]] = []
    run(trace, probe(), tmp_path / "r", workers=1, progress=lambda *at: told.append(at))
    assert told[0] == (0, TASKS)
    assert figures(tmp_path / "r") == one


def test_parts_and_merge(trace: Trace, probe: Any, tmp_path: Path, one: Any) -> None:
    for i, name in enumerate(("a", "b", "a", "b"), start=1):
        run(trace, probe(), tmp_path / name, part=(i, 4), workers=1)
    with pytest.raises(RetraceError, match=r"add --method PATH/mine\.py:Probe"):
        merge([tmp_path / "a", tmp_path / "b"])
    results = merge([tmp_path / "a", tmp_path / "b"], methods=[probe()])
    assert figures(tmp_path / "a") == one
    assert not (tmp_path / "b" / ".parts").exists()
    assert results.profile()["Of Wall"].sum() == pytest.approx(1)
    assert results.run["methods"].keys() == Results.load(tmp_path / "one").run["methods"].keys()


def test_sequences_that_were_left_out_stay_so(trace: Trace, probe: Any, tmp_path: Path) -> None:
    whole = run(trace.without({0: "damaged"}), probe(), tmp_path / "whole", workers=1)
    for i in (1, 2):
        run(trace.without({0: "damaged"}), probe(), tmp_path / "r", part=(i, 2), workers=1)
        # One that had not been captured when the run began.
        fewer = trace.without({})
        fewer.sequences = (1, 2)
        run(fewer, probe(), tmp_path / "fewer", part=(i, 2), workers=1)
    results = merge([tmp_path / "r"], methods=[probe()])
    assert figures(tmp_path / "r") == figures(tmp_path / "whole")
    assert merge([tmp_path / "fewer"], methods=[probe()]).run["sequences"] == [1]
    assert results.run["sequences"] == whole.run["sequences"] == [1]


def test_merged_parts_add_to_what_is_there(trace: Trace, probe: Any, tmp_path: Path) -> None:
    settings = {"out": tmp_path / "r", "min_context": 10, "keep_exact": False}
    analyze(trace, ["exact"], [2], **settings)
    for i in (1, 2):
        analyze(trace, ["exact", probe()], [2], part=(i, 2), **settings)
    assert merge([tmp_path / "r"], methods=[probe()]).methods() == ["exact", "mine.py:Probe"]


@pytest.mark.parametrize(
    ("part", "message"),
    [((0, 2), "expected 1/2 to 2/2"), ((3, 2), "1/2"), ((7, 7), "only 6 layers")],
)
def test_parts_that_are_none(
    trace: Trace, probe: Any, tmp_path: Path, part: tuple[int, int], message: str
) -> None:
    with pytest.raises(RetraceError, match=message):
        run(trace, probe(), tmp_path / "r", part=part)


def test_processes_end_with_their_owner() -> None:
    script = (
        "from retrace.analyze.workers.processes import Processes; import os, signal\n"
        "pool = Processes(1); print(pool.submit(os.getpid).result(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        threading.Event().wait(0.1)
    raise AssertionError("it lives on")


def test_what_is_not_wanted_is_ended_at_once() -> None:
    pool = Processes(1)
    pool.submit(os.getpid).result()
    future = pool.submit(signal.pause)
    threading.Event().wait(0.2)
    pool.shutdown(cancel_futures=True)
    assert isinstance(future.exception(), WorkerDied)
