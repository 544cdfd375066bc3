"""Methods from a file that is not installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retrace.analyze import Keep, analyze, parse_spec
from retrace.analyze.methods.specs import recorded_spec
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
OLDEST = """
@dataclass(frozen=True, kw_only=True)
class Oldest(ScoreMethod):
    slope: float = field(default=1.0, metadata={"help": "how fast scores fall"})
    first: int | None = None
    loud: bool = False

    def scores(self, state, queries, positions):
        age = -torch.arange(state.end) * self.slope
        return age.expand(*queries.shape[:2], -1)
"""


def oldest(query: Any, k: int) -> list[int]:
    """The k oldest visible keys."""
    return [int(j) for j in query.visible[:k]]


def test_class(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any, write_methods: Any
) -> None:
    trace = make_trace(rules(heads=4, window=20))
    spec = f"{write_methods(OLDEST)}:Oldest"
    results = analyze(trace, [spec], [3], keep_exact=False)
    assert_figures(results, "mine.py:Oldest", 3, expected(trace, oldest, 3))


def test_parameters(write_methods: Any) -> None:
    path = write_methods(OLDEST)
    spec = parse_spec(f"{path}:Oldest:slope=-2.5,keep=sink:4+recent:8,first=none,loud=true")
    assert spec.parameters == {
        "cache": None,
        "pool": "none",
        "keep": "sink:4+recent:8",
        "budget": "k",
        "output": "renorm",
        "slope": -2.5,
        "first": None,
        "loud": True,
    }
    assert spec.method.keep == Keep(sink=4, recent=8)  # type: ignore[attr-defined]
    assert str(spec) == "mine.py:Oldest:keep=sink:4+recent:8,slope=-2.5,loud=True"


def test_relative_path(write_methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_methods(OLDEST)
    monkeypatch.chdir(tmp_path)
    for text in ("./mine.py:Oldest", "mine.py:Oldest", "mine.py:Oldest:slope=2.0"):
        again = parse_spec(str(parse_spec(text)))
        assert again.parameters == parse_spec(text).parameters


def test_annotations_as_text(write_methods: Any, tmp_path: Path) -> None:
    path = Path(write_methods(OLDEST))
    path.write_text("from __future__ import annotations\n" + path.read_text())
    assert parse_spec(f"{path}:Oldest:slope=3").parameters["slope"] == 3.0


def test_edited_file_is_computed_again(
    make_trace: MakeTrace, rules: Any, write_methods: Any, tmp_path: Path
) -> None:
    trace = make_trace(rules())
    spec, out = f"{write_methods(OLDEST)}:Oldest", tmp_path / "results"
    first = analyze(trace, ["exact", spec], [2], out=out, keep_exact=False)
    same = analyze(trace, ["exact", spec], [2], out=out, keep_exact=False)
    pd.testing.assert_frame_equal(first.metrics, same.metrics)
    assert len(same.run["history"]) == 1
    write_methods(OLDEST.replace("-torch.arange", "+torch.arange"))
    edited = analyze(trace, ["exact", spec], [2], out=out, keep_exact=False)
    assert edited.run["history"][1]["methods"] == {"mine.py:Oldest": [2]}

    def recall(results: Any) -> list[float]:
        rows = results.metrics
        chosen = (rows.method == "mine.py:Oldest") & (rows.metric == "recall")
        return list(rows[chosen]["mean"])

    assert len(recall(edited)) == len(recall(first)) == 2
    assert recall(edited) != recall(first)


def test_edited_file_drops_the_old_budgets(
    make_trace: MakeTrace, rules: Any, write_methods: Any, tmp_path: Path
) -> None:
    trace = make_trace(rules())
    spec, out = f"{write_methods(OLDEST)}:Oldest", tmp_path / "results"
    analyze(trace, ["exact", spec], [2, 3], out=out, keep_exact=False)
    write_methods(OLDEST + "# edited\n")
    results = analyze(trace, [spec], [3], out=out, keep_exact=False)
    assert results.topk("mine.py:Oldest") == [3]
    assert results.topk("exact") == [2, 3]


def test_two_files_of_one_name(
    make_trace: MakeTrace, rules: Any, write_methods: Any, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    one = write_methods(OLDEST)
    two = write_methods(OLDEST.replace("-torch", "+torch"), "other/mine.py")
    with pytest.raises(RetraceError, match=r"Two different methods are mine\.py:Oldest"):
        analyze(make_trace(rules()), [f"{one}:Oldest", f"{two}:Oldest"], [2], keep_exact=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{path}:Oldes", "no method or function 'Oldes'. Did you mean Oldest"),
        ("{path}:Oldest:slop=1", "no parameter 'slop'. Did you mean slope"),
        ("{path}:Oldest:slope=steep", "slope='steep': expected float"),
        ("{path}:Oldest:first=1.5", "first='1.5': expected int"),
        ("{path}:Oldest:loud=maybe", "loud='maybe': expected bool"),
        ("{path}:Oldest:slope", "'slope' in its spec is not of the form key=value"),
        ("{path}:dataclass:a=1", "is a function: it takes no parameters"),
        ("{path}x/gone.py:Oldest", "There is no file"),
    ],
)
def test_mistakes(write_methods: Any, spec: str, message: str) -> None:
    with pytest.raises(RetraceError) as caught:
        parse_spec(spec.format(path=write_methods(OLDEST)))
    assert message in str(caught.value)


def test_file_that_does_not_run(write_methods: Any) -> None:
    with pytest.raises(RetraceError, match=r"could not be loaded: ZeroDivisionError"):
        parse_spec(f"{write_methods('1 / 0')}:Mine")


def test_data_run_no_file(write_methods: Any, tmp_path: Path) -> None:
    path, ran = Path(write_methods(OLDEST)), tmp_path / "ran"
    path.write_text(f"open({str(ran)!r}, 'w').close()\n{path.read_text()}")
    recorded = f"{path}:Oldest:slope=2.0"
    for named in ([], ["quest"], [f"{path}:Other"], [f"{path.with_name('other.py')}:Oldest"]):
        with pytest.raises(RetraceError, match=r"add --method PATH/mine\.py:Oldest"):
            recorded_spec(recorded, named)
    assert not ran.exists()
    spec = recorded_spec("long/gone/mine.py:Oldest:slope=2.0", ["quest", f"{path}:Oldest"])
    assert ran.exists()
    assert spec.parameters["slope"] == 2.0
    assert recorded_spec(recorded, [f"{path}:Oldest"]).file == path
