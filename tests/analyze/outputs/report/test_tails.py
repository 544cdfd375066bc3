"""Tails on a page: the worst queries, and pictures of them where their trace is here."""

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import Results, analyze, report
from retrace.analyze.commands.worst import METRIC, worst_pictures
from retrace.analyze.metrics.registry import BY_NAME, TAILED
from retrace.analyze.tables.tails import show_command, tails_of_all
from retrace.traces import Trace

pytest.importorskip("plotly", reason="needs the report extra")

MakeTrace = Callable[..., Trace]
METHODS = ["exact", "window", "quest:page=4"]


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    return make_trace([rules(heads=4, kv_heads=2), rules(heads=4, kv_heads=2)], [70, 60], name="t")


@pytest.fixture
def folder(trace: Trace, tmp_path: Path) -> Path:
    analyze(trace, METHODS, [3, 6], min_context=20, out=tmp_path / "r")
    return tmp_path / "r"


def test_one_line_for_each_method_and_budget(folder: Path) -> None:
    results = Results.load(folder)
    found = tails_of_all(results.tails)
    assert len(found) == len(METHODS) * 2 * len(TAILED)
    tails = results.tails.astype({"method": "str", "metric": "str"})
    for row in found.to_dict("records"):
        mine = (tails["method"] == row["method"]) & (tails["topk"] == row["topk"])
        part = tails[mine & (tails["metric"] == row["metric"])]
        assert len(part) == 8
        for name in ("p5", "p50", "p95"):
            assert row[name] == pytest.approx(np.mean(part[name].to_numpy(np.float64)))
        worst = part["worst"].min() if BY_NAME[row["metric"]].better > 0 else part["worst"].max()
        assert row["worst"] == worst
        at = part[(part["layer"] == row["layer"]) & (part["head"] == row["head"])].iloc[0]
        assert (at["worst"], at["worst_position"]) == (worst, row["worst_position"])


def test_the_command(folder: Path, trace: Trace) -> None:
    results = Results.load(folder)
    row = tails_of_all(results.tails).to_dict("records")[-1]
    words = shlex.split(show_command(results.run, row))
    assert words[:3] == ["retrace", "show", str(trace.path)]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given == {
        "--layer": str(row["layer"]),
        "--head": str(row["head"]),
        "--sequence": str(row["worst_sequence"]),
        "--position": str(row["worst_position"]),
        "--topk": "6",
        "--method": "quest:page=4",
        "--protocol": results.run["protocol"],
    }
    held_out = {**results.run, "calibration": [2, 3], "protocol": "all"}
    assert show_command(held_out, row).endswith(" --calibration 2,3")
    assert "--protocol" not in show_command(held_out, row)
    results.run["methods"]["quest:page=4"]["given"] = True
    assert show_command(results.run, row) == ""


def test_pictures(folder: Path, held: Any, tmp_path: Path) -> None:
    def texts_of(trace: Trace) -> Callable[[Sequence[int]], list[str]]:
        return lambda ids: [f"<{token}>" for token in ids]

    results = Results.load(folder)
    [run] = held(report([folder], tmp_path / "a.html", texts_of).read_text()).index["runs"]
    assert len(run["tails"]) == len(tails_of_all(results.tails))
    pictures = run["worst"]["pictures"]
    assert not run["worst"]["missing"]
    told = {m for picture in pictures for m in METHODS if m in picture["why"]}
    assert told == set(METHODS)
    worst = tails_of_all(results.tails).set_index(["method", "topk", "metric"])["worst"]
    for picture in pictures:
        assert sorted(picture["methods"]) == sorted(METHODS)
        for method in METHODS:
            keys, best, recall, mass, _ = picture["figures"][picture["methods"].index(method)]
            taken = sum(k["taken"][picture["methods"].index(method)] for k in picture["keys"])
            assert taken == best and (method != "exact" or (keys, recall) == (6, 1.0))
            if method in picture["why"]:
                assert mass == pytest.approx(worst[method, 6, METRIC], rel=1e-5, abs=1e-9)
        assert all(token[0] == "<" for token in picture["tokens"])


def test_no_trace_no_picture(folder: Path, trace: Trace, make_trace: MakeTrace, rules: Any) -> None:
    results, place = Results.load(folder), Path(str(trace.path))
    other = make_trace([rules(heads=4, kv_heads=2)] * 2, [70, 60], name="other", seed=1)
    shutil.rmtree(place)
    assert worst_pictures(results, None) == ([], "The trace is not on this machine.")
    shutil.copytree(str(other.path), place)
    pictures, why = worst_pictures(results, None)
    assert not pictures and "is not the trace of these results" in why
    results.run["trace_path"] = "s3://bucket/t.zarr"
    assert worst_pictures(results, None) == ([], "The trace is not on this machine.")


def test_no_code_that_results_name_is_run(
    trace: Trace, write_methods: Callable[..., str], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    body = f"""
    open({str(ran)!r}, "w").close()

    @dataclass(frozen=True)
    class Last(ScoreMethod):
        \"\"\"The last keys.\"\"\"
        source = "none"
        holds_keys = False

        def build(self, past):
            return past

        def scores(self, state, queries, positions):
            return torch.arange(len(state.keys)).float().expand(*queries.shape[:2], -1)
    """
    analyze(trace, [f"{write_methods(body)}:Last"], [6], min_context=20, out=tmp_path / "own")
    ran.unlink()
    pictures, why = worst_pictures(Results.load(tmp_path / "own"), None)
    assert not pictures and "is run only where you name it" in why
    assert not ran.exists()


def test_figures_of_other_code(folder: Path) -> None:
    results = Results.load(folder)
    mine = (results.tails["method"] == "window") & (results.tails["metric"] == METRIC)
    results.tails.loc[mine, "worst"] *= np.float32(0.5)
    pictures, why = worst_pictures(results, None)
    assert "window attends to other keys here than in its run" in why
    assert pictures and not any(picture["why"].startswith("window") for picture in pictures)
