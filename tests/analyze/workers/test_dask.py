"""A Dask cluster comes to the same bytes as one worker."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from typing import Any

import pytest

from retrace.analyze import analyze
from retrace.analyze.storage.journal import read_journals
from retrace.analyze.workers.dask import PAUSE, Cluster
from retrace.analyze.workers.retry import finished
from retrace.traces import RetraceError, Trace

distributed = pytest.importorskip("distributed", reason="needs the extra cluster")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster of two processes on this machine."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


METHOD = """
@dataclass(frozen=True)
class Norm(ScoreMethod):
    def build(self, past):
        return past.keys.norm(dim=-1)

    def scores(self, state, queries, positions):
        return state.expand(*queries.shape[:2], -1)
"""


def test_the_same_bytes(
    make_trace: Callable[..., Trace],
    rules: Any,
    write_methods: Callable[..., str],
    tmp_path: Path,
    scheduler: str,
) -> None:
    trace = make_trace([rules(heads=4), rules(window=9)], [53, 24, 40])
    methods = ["exact", "quest:page=4", "loki", f"{write_methods(METHOD)}:Norm"]
    for name, settings in (("one", {"workers": 1}), ("cluster", {"executor": scheduler})):
        results = analyze(trace, methods, [2, 5], out=tmp_path / name, keep_exact=False, **settings)
    assert results.run["history"][0]["profile"]["workers"] == 2
    for table in ("metrics.parquet", "curves.parquet", "positions.parquet", "tails.parquet"):
        bytes_of = [(tmp_path / name / table).read_bytes() for name in ("one", "cluster")]
        assert bytes_of[0] == bytes_of[1]


def run(trace: Trace, out: Path, **settings: Any) -> list[tuple[int, int]]:
    """Analyze, and tell what was told of progress."""
    told: list[tuple[int, int]] = []
    show = settings.pop("progress", lambda done, total: None)

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        show(done, total)

    settings |= {"out": out, "keep_exact": False, "min_context": 10, "progress": progress}
    analyze(trace, ["exact", "window"], [2, 5], **settings)
    return told


CLUSTER = """
import distributed, threading
cluster = distributed.LocalCluster(
    n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
)
print(cluster.scheduler_address, flush=True)
threading.Event().wait()
"""


def test_a_scheduler_that_is_killed(
    make_trace: Callable[..., Trace], rules: Any, tmp_path: Path, scheduler: str
) -> None:
    import dask

    trace = make_trace([rules(), rules(window=9)], [53, 24, 40])
    run(trace, tmp_path / "one", workers=1)
    with subprocess.Popen([sys.executable, "-c", CLUSTER], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None

        def kill(done: int, total: int) -> None:
            if done == 2:
                other.kill()

        with (
            dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
            pytest.raises(RetraceError, match=r"is gone\. What is finished is kept"),
        ):
            address = other.stdout.readline().decode().strip()
            run(trace, tmp_path / "r", executor=address, progress=kill)
    (parts,) = (tmp_path / "r").glob(".parts/*")
    kept = len(list(read_journals(parts)))
    assert kept >= 2
    told = run(trace, tmp_path / "r", executor=scheduler)
    assert told[0] == (kept, 6)
    figures = [(tmp_path / name / "metrics.parquet").read_bytes() for name in ("one", "r")]
    assert figures[0] == figures[1]


class Silent:
    """A client that calls nobody back, and a future of it."""

    status = "running"

    def submit(self, *call: Any, **settings: Any) -> "Silent":
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callback = callback

    def cancelled(self) -> bool:
        return False

    def result(self) -> int:
        return 3


def test_a_client_that_gave_up_without_a_word() -> None:
    client = Silent()
    with Cluster(client) as executor:
        futures = [executor.submit(int) for _ in range(3)]
        client.callback(client)
        assert futures[2].result(timeout=0) == 3
        assert futures[1].cancel()
        assert not wait(futures[:1], timeout=2 * PAUSE).done
        client.status = "closed"
        with pytest.raises(ConnectionError, match="the connection to the Dask scheduler was lost"):
            futures[0].result(timeout=30)
        client.callback(client)  # late
        assert futures[2].result(timeout=0) == 3


def test_a_unit_that_dask_gave_up() -> None:
    from distributed.scheduler import WorkerState

    class Giving(Executor):
        def submit(self, *call: Any) -> Future[Any]:  # type: ignore[override]
            calls.append(call)
            future: Future[Any] = Future()
            worker = WorkerState.__new__(WorkerState)
            future.set_exception(distributed.KilledWorker("task", worker, 3))
            return future

    calls: list[Any] = []
    [(key, answer)] = finished(Giving(), {"unit": int})
    assert (key, str(answer)) == ("unit", "4 workers of the Dask cluster died of it")
    assert len(calls) == 1


def test_no_scheduler(make_trace: Callable[..., Trace], rules: Any) -> None:
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(RetraceError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:1 "),
    ):
        analyze(make_trace(rules()), topk=[2], executor="tcp://127.0.0.1:1", keep_exact=False)


def test_the_library_is_named(
    make_trace: Callable[..., Trace], rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RetraceError, match=r"retrace-attention\[cluster\]"):
        analyze(make_trace(rules()), topk=[2], executor="tcp://127.0.0.1:1", keep_exact=False)
