"""A Dask cluster comes to the same bytes as one worker."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retrace.analyze import analyze
from retrace.traces import RetraceError, Trace

distributed = pytest.importorskip("distributed", reason="needs the extra cluster")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster of two processes on this machine."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
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
    for table in ("metrics.parquet", "curves.parquet", "positions.parquet"):
        bytes_of = [(tmp_path / name / table).read_bytes() for name in ("one", "cluster")]
        assert bytes_of[0] == bytes_of[1]


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
