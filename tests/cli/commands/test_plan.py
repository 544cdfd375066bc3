"""Plans from the command line: recommended, shown, replayed and in the loop."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def exact(run: Run, model: Path, text: Path) -> str:
    run(
        "capture", "--pretrained", model, "--text", text, "--limit", "4", "--max-length", "60",
        "--out", "exact.zarr",
    )  # fmt: skip
    return "exact.zarr"


def test_from_a_recommendation_to_the_loop(run: Run, exact: str) -> None:
    run(
        "recommend", exact, "--target", "error_norm=0.9", "--method", "window", "--method", "exact",
        "--topk", "4,8", "--out", "p.json",
    )  # fmt: skip
    shown = run("plan", "p.json", "--plot", "map.png").stdout
    name = next(word for word in shown.split() if word.startswith("plan:"))
    assert Path("map.png").stat().st_size > 1000
    result = run("analyze", exact, "--plan", "p.json", "--min-context", "30", "--format", "json")
    rows = json.loads(result.stdout)
    assert {row["method"] for row in rows} == {name} and {row["topk"] for row in rows} <= {4, 8}
    result = run("analyze", exact, "--plan", "p.json", "--min-context", "30", "--method", "exact")
    assert "The top-k of a plan is its largest" in result.stdout
    [point] = json.loads(run("evaluate", exact, "--plan", "p.json", "--format", "json").stdout)
    assert point["method"] == name
    run("capture", "--reference", exact, "--approximate", "plan:p.json")
    told = json.loads(
        run("compare", exact, "traces/exact-plan-p.zarr", "--format", "json", "--no-plots").stdout
    )
    assert told["runs"][0]["method"] == name
    assert told["runs"][0]["perplexity"] == pytest.approx(point["perplexity"], rel=1e-4)


def test_two_plans(run: Run, exact: str) -> None:
    for target, out in (("error_norm=0.9", "a.json"), ("bytes_ratio=0.5", "b.json")):
        run(
            "recommend", exact, "--target", target, "--method", "exact", "--method", "window",
            "--topk", "4,8", "--out", out,
        )  # fmt: skip
    rows = json.loads(run("plan", "a.json", "b.json", "--format", "json").stdout)
    assert rows and all(row["this"] != row["other"] for row in rows)
    assert "in one plan and" in run("plan", "a.json", "b.json", "--merge", "c.json", code=2).stderr
    run("plan", "a.json", "b.json", "--merge", "c.json", "--override")
    assert json.loads(run("plan", "c.json", "b.json", "--format", "json").stdout) == []
    assert "name another one" in run("plan", "a.json", "--merge", "c.json", code=2).stderr


def test_mistakes(run: Run, exact: str) -> None:
    Path("p.json").write_text('{"retrace_plan": 1, "layers": [{"layer": 0}]}')
    for command in (("plan", "p.json"), ("analyze", exact, "--plan", "p.json")):
        assert "layers[0] has no module" in run(*command, code=2).stderr
    assert "There is no plan" in run("evaluate", exact, "--plan", "x.json", code=2).stderr
    assert "or a plan" in run("evaluate", exact, code=2).stderr
    assert "How many keys" in run("evaluate", exact, "--method", "window", code=2).stderr
