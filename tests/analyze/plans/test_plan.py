"""Plans as files: read, refused, merged, compared and drawn."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from retrace.analyze import Plan, draw_plan, recommend
from retrace.analyze.outputs.plots.plans import plan_map
from retrace.analyze.plans.plan import PlannedLayer, Setting
from retrace.analyze.plans.schema import mistake, schema
from retrace.traces import RetraceError

GOOD: dict[str, Any] = {
    "retrace_plan": 1,
    "model": None,
    "layers": [
        {
            "layer": 0,
            "module": "a",
            "group": 2,
            "kv_heads": [
                {"kv_head": 0, "method": "quest:page=8", "topk": 64},
                {"kv_head": 1, "method": "dense", "topk": 0},
            ],
        },
        {"layer": 4, "module": "b", "kv_heads": [{"kv_head": 0, "method": "x", "fraction": 0.1}]},
    ],
}
"""What a file holds."""


def changed(*path: Any, to: Any = None) -> dict[str, Any]:
    """`GOOD` with something else at a place, or without it."""
    content = copy.deepcopy(GOOD)
    at: Any = content
    for name in path[:-1]:
        at = at[name]
    if to is None:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return content


HEAD = ("layers", 0, "kv_heads", 0)
BAD: list[tuple[dict[str, Any], str]] = [
    (changed("layers"), "it has no layers"),
    (changed("layers", to=[]), r"layers is \[\]: expected at least 1 entry"),
    (changed("layers", to={}), r"layers is \{\}: expected a list"),
    (changed("retrace_plan"), "it has no retrace_recommendation or retrace_plan"),
    (changed("retrace_plan", to=2), "retrace_plan is 2: expected 1"),
    (changed("layers", 0, "layer", to=-1), r"layers\[0\].layer is -1: expected at least 0"),
    (changed("layers", 1, "module"), r"layers\[1\] has no module"),
    (changed("layers", 1, "module", to=""), "expected at least 1 character"),
    (changed(*HEAD, "method", to=7), r"kv_heads\[0\].method is 7: expected a text"),
    (changed(*HEAD, "topk", to="64"), 'topk is "64": expected a whole number'),
    (changed(*HEAD, "topk", to=True), "topk is true: expected a whole number"),
    (changed("layers", 1, "kv_heads", 0, "fraction", to=0), "fraction is 0: expected more than 0"),
    (changed("layers", 1, "kv_heads", 0, "fraction", to=2), "fraction is 2: expected at most 1"),
]
UNSCHEMED: list[tuple[dict[str, Any], str]] = [
    (changed("layers", 1, "layer", to=0), "layer 0 stands there twice"),
    (changed(*HEAD, "kv_head", to=1), "layer 0 names 2 kv heads: expected each of 0 to 1 once"),
    (changed(*HEAD, "topk"), "kv head 0 has quest:page=8, and needs a budget"),
    (changed(*HEAD, "topk", to=0), "needs a budget"),
    (changed(*HEAD, "heads", to=[{}]), "kv heads of .* query heads"),
]
"""What no schema can say."""


@pytest.mark.parametrize(("content", "words"), [*BAD, *UNSCHEMED])
def test_bad_plans_get_one_line(content: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content))
    with pytest.raises(RetraceError, match=words) as error:
        Plan.load(file)
    assert str(error.value).startswith(f"{file} is no plan: ") and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RetraceError, match=r"There is no plan .*recommend --out FILE"):
        Plan.load(tmp_path / "nowhere.json")
    for text in ("no JSON", "[1, 2]", "null", '"plan"'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(RetraceError, match="is no plan"):
            Plan.load(tmp_path / "p.json")


def test_the_schema_is_one_that_others_read() -> None:
    """It says of every file what this package's reader says."""
    validation = pytest.importorskip("jsonschema", reason="comes with nbformat, of the dev extra")
    validation.Draft202012Validator.check_schema(schema())
    others = validation.Draft202012Validator(schema())
    for content, _ in [*BAD, *UNSCHEMED, (GOOD, "")]:
        assert others.is_valid(content) == (mistake(content) is None)
    assert sum(not others.is_valid(content) for content, _ in BAD) == len(BAD)


def test_round_trip(tmp_path: Path) -> None:
    plan = Plan.from_json(GOOD)
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == plan
    assert Plan.load(tmp_path / "p.json").digest == plan.digest
    assert plan.of(0, 0) == Setting("quest:page=8", 64) and plan.of(0, 1).full
    assert plan.layers[0].group == 2 and plan.layers[4].group is None
    for other in (changed(*HEAD, "topk", to=65), changed("layers", 1, "layer", to=5)):
        assert Plan.from_json(other).digest != plan.digest


def test_a_recommendation_is_a_plan(make_trace: Any, rules: Any, tmp_path: Path) -> None:
    trace = make_trace([rules(heads=4), rules(heads=4, window=21)], [48] * 4)
    found = recommend(
        trace, "attention_fraction=0.8", ["window", "exact"], [8, 16], keep_exact=False
    )
    found.save(tmp_path / "r.json")
    plan = Plan.load(tmp_path / "r.json")
    for row in found.kv_heads.to_dict("records"):
        setting = plan.of(row["layer"], row["kv_head"])
        assert (setting.method, setting.topk) == (row["method"], row["topk"])
    plan.check_fits({i: trace.layer(i).rules for i in trace.layers}, "the trace")


def test_fractions_round_up() -> None:
    assert Setting("x", fraction=0.29).budget(100) == 29  # 0.29 * 100 is a little more
    assert Setting("x", fraction=0.1).budget(101) == 11
    assert Setting("x", fraction=0.001).budget(9) == 1


def planned(*settings: Setting, first: int = 0) -> Plan:
    return Plan({first + i: PlannedLayer(f"l{first + i}", (s,)) for i, s in enumerate(settings)})


def test_merging() -> None:
    a, b, c = Setting("quest", 8), Setting("dense"), Setting("window", 4)
    assert planned(a, b).merge(planned(c, first=2)) == planned(a, b, c)
    assert planned(a, b).merge(planned(b, c, first=1)) == planned(a, b, c)
    with pytest.raises(RetraceError, match="Layer 1, kv head 0 has dense in one plan and window"):
        planned(a, b).merge(planned(c, first=1))
    assert planned(a, b).merge(planned(c, first=1), override=True) == planned(a, c)
    with pytest.raises(RetraceError, match="two models: layer 0 is l0 with 1"):
        planned(a).merge(Plan({0: PlannedLayer("other", (a,))}))


def test_comparing() -> None:
    a, b = planned(Setting("quest", 8), Setting("dense")), planned(Setting("quest", 9))
    rows = a.compare(b).to_dict("records")
    assert rows == [
        {"layer": 0, "kv_head": 0, "this": "quest, 8", "other": "quest, 9"},
        {"layer": 1, "kv_head": 0, "this": "dense", "other": ""},
    ]
    assert a.compare(a).empty
    assert planned(*[Setting("dense")] * 2, Setting("quest", 8)).counts() == {
        "dense": 2,
        "quest, 8": 1,
    }


def test_the_map_shows_each_head(tmp_path: Path) -> None:
    plan = Plan.from_json(GOOD)
    figure = plan_map(plan)
    chosen, budgets = (axes.get_images()[0].get_array() for axes in figure.axes[:2])
    assert chosen.tolist() == [[0, 1], [2, None]]
    assert budgets.tolist() == [[64, None], [0.1, None]]
    assert draw_plan(plan, tmp_path / "deep" / "map.png").stat().st_size > 1000
