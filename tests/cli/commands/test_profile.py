"""`retrace analyze --profile`: where the time went."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.analyze import Results, analyze
from retrace.traces import RetraceError

Run = Callable[..., Result]
METHODS = ("--method", "exact", "--method", "quest:page=4")
OPTIONS = (*METHODS, "--topk", "2,5", "--no-plots")


def test_every_step_is_accounted_for(trace: Path) -> None:
    results = analyze(trace, ["exact", "quest:page=4", "loki"], [2, 5])
    table = results.profile().set_index(["Step", "Method"])
    shared = ["read", "exact answers read", "exact pass", "exact answers kept"]
    shared += ["metrics", "everything else"]
    own = [
        (step, method)
        for method in ("exact", "quest:page=4", "loki")
        for step in ("causality check", "build", "search", "metrics")
    ]
    assert set(table.index) == {
        *((step, "") for step in shared),
        *own,
        ("calibration", "loki"),
    }
    assert table["Of Wall"].sum() == pytest.approx(1)
    assert table["Of Thread-Seconds"].sum() == pytest.approx(1)
    for at in [("exact pass", ""), ("search", "loki"), ("metrics", "exact"), ("build", "loki")]:
        assert table["Seconds"][at] > 0
    # No second counts twice.
    wall, workers = (results.run["history"][0]["profile"][key] for key in ("wall", "workers"))
    assert 0 <= table["Seconds"]["everything else", ""] < workers * wall
    assert table["Seconds"].sum() <= workers * wall * 1.001


def test_kept_answers_are_told_from_those_computed(trace: Path) -> None:
    analyze(trace, ["exact"], [2])
    table = analyze(trace, ["window"], [2]).profile().set_index("Step")
    assert "exact pass" not in table.index
    assert table["Seconds"]["exact answers read"] > 0


def test_the_table_is_on_stderr(run: Run, trace: Path) -> None:
    result = run("analyze", trace, *OPTIONS, "--profile", "--format", "json")
    assert json.loads(result.stdout)
    lines = [line.split() for line in result.stderr.splitlines() if line.strip()]
    [first] = [i for i, line in enumerate(lines) if line[:2] == ["Step", "Method"]]
    assert lines[first - 1][:2] == ["Where", "the"]
    assert ["search", "quest:page=4"] in [line[:2] for line in lines[first:]]
    assert "Where the" not in run("analyze", trace, *OPTIONS).stderr


def test_it_is_kept_with_the_results(run: Run, trace: Path) -> None:
    run("analyze", trace, *OPTIONS, "--out", "r")
    run("analyze", trace, *OPTIONS, "--method", "window", "--out", "r")
    results = Results.load("r")
    assert [set(h["profile"]) for h in results.run["history"]] == [
        {"wall", "workers", "synchronised", "spent"}
    ] * 2
    assert set(results.profile()["Method"]) == {"", "window"}  # the newest run's


def test_what_was_not_waited_for_is_not_told(trace: Path) -> None:
    results = analyze(trace, ["exact"], [2])
    results.run["history"][-1]["profile"]["synchronised"] = False
    with pytest.raises(RetraceError, match="--profile"):
        results.profile()
