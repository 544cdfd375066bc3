"""A plan in replay is each kv head's own method and budget, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retrace.analyze import Plan, analyze, merge, show
from retrace.analyze.plans.plan import PlannedLayer, Setting
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
SETTINGS = (
    Setting("quest:page=4", 8),
    Setting("dense"),
    Setting("snapkv", 5),
    Setting("loki:rank=4", 9),
    Setting("window", 6),
    Setting("flat", 7),
    Setting("exact:pool=layer-mean", 4),
    Setting("h2o", 3),
)
LARGEST = 9


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Four kv heads in two layers, of which one has a window."""
    layers = [rules(heads=8, kv_heads=4), rules(heads=8, kv_heads=4, window=21)]
    return make_trace(layers, [60, 40, 50])


def planned(trace: Trace, settings: Any = SETTINGS) -> Plan:
    """A plan that gives the kv heads of a trace these settings, one after another."""
    layers, left = {}, list(settings)
    for index in trace.layers:
        rules = trace.layer(index).rules
        own, left = left[: rules.kv_heads], left[rules.kv_heads :]
        layers[index] = PlannedLayer(rules.module, tuple(own), rules.group)
    return Plan(layers)


def of_kv_head(rows: pd.DataFrame, at: tuple[int, int]) -> pd.DataFrame:
    """The figures of the two heads of a kv head, whatever gave them."""
    rows = rows[(rows["layer"] == at[0]) & (rows["head"] // 2 == at[1]) & (rows["count"] > 0)]
    rows = rows.drop(columns=["method", "topk"]).astype({"metric": str})
    keys = [name for name in rows if name not in ("mean", "std", "count")]
    return rows.sort_values(keys, kind="stable").reset_index(drop=True)


@pytest.mark.parametrize("protocol", ["all", "prefix:20", "decode:8:from=16"])
def test_each_head_has_the_figures_of_its_setting(
    make_trace: MakeTrace, rules: Any, trace: Trace, protocol: str
) -> None:
    if protocol.startswith("decode"):  # what evicts does so over all keys
        trace = make_trace([rules(heads=8, kv_heads=4)] * 2, [60, 40, 50])
    plan = planned(trace)
    options: dict[str, Any] = {"protocol": protocol, "min_context": 22, "keep_exact": False}
    options["calibration_sequences"] = [1]
    found = analyze(trace, plan, **options)
    assert found.methods() == [f"plan:{plan.digest}"]
    assert found.topk(found.methods()[0]) == [LARGEST]
    for at, setting in plan.settings.items():
        alone = analyze(trace, setting.method, [setting.topk or LARGEST], **options)
        for name in ("metrics", "sequences", "positions", "tails"):
            ours, theirs = (getattr(one, name) for one in (found, alone))
            if name in ("positions", "tails"):
                assert len(theirs)
            theirs = of_kv_head(theirs, at)
            assert len(theirs)
            pd.testing.assert_frame_equal(of_kv_head(ours, at), theirs, check_exact=True)


def test_the_same_bytes_wherever_it_is_replayed(trace: Trace, tmp_path: Path) -> None:
    """In processes, in parts, and again from the folder."""
    plan = planned(trace)
    plan.save(tmp_path / "plan.json")
    options: dict[str, Any] = {"calibration_sequences": [1], "min_context": 22}
    here = analyze(trace, plan, workers=1, **options)
    apart = analyze(trace, plan, workers=2, **options)
    named = f"plan:{tmp_path / 'plan.json'}"
    for part in ((1, 2), (2, 2)):
        analyze(trace, named, out=tmp_path / "r", part=part, **options)
    merged = merge([tmp_path / "r"])
    again = analyze(trace, named, out=tmp_path / "r", **options)
    assert len(again.run["history"]) == 1
    for other in (apart, merged, again):
        for name in ("metrics", "curves", "sequences", "positions", "tails"):
            ours, theirs = getattr(here, name), getattr(other, name)
            pd.testing.assert_frame_equal(ours, theirs, check_dtype=False, check_exact=True)
    assert here.run["methods"][f"plan:{plan.digest}"]["parameters"] == {"kv_heads": 8, "full": 1}


def test_fractions_are_of_each_sequence(trace: Trace) -> None:
    """A tenth of 60, 40 and 50 positions, rounded up."""
    layers = {
        i: PlannedLayer(layer.module, (Setting("window", fraction=0.1),) * 4)
        for i, layer in planned(trace).layers.items()
    }
    options: dict[str, Any] = {"min_context": 22, "keep_exact": False}
    found = analyze(trace, Plan(layers), **options).sequences
    for sequence, k in enumerate((6, 4, 5)):
        alone = analyze(trace, "window", [k], **options).sequences
        ours, theirs = (
            rows[rows["sequence"] == sequence].drop(columns=["method", "topk"])
            for rows in (found, alone)
        )
        keys = ["layer", "head", "metric"]
        pd.testing.assert_frame_equal(
            ours.sort_values(keys).reset_index(drop=True),
            theirs.sort_values(keys).reset_index(drop=True),
        )


def test_beside_other_methods(trace: Trace) -> None:
    """Budgets asked for are not the plan's, and its own not the others'."""
    plan = planned(trace)
    options: dict[str, Any] = {"calibration_sequences": [1], "min_context": 22}
    found = analyze(trace, {"mine": plan, "w": "window"}, [2, 4], **options, keep_exact=False)
    assert {name: found.topk(name) for name in found.methods()} == {"mine": [9], "w": [2, 4]}


def test_other_models_are_refused(make_trace: MakeTrace, rules: Any, trace: Trace) -> None:
    plan = planned(trace)
    fewer = make_trace([rules(heads=8, kv_heads=2)] * 2, [60, 40, 50])
    with pytest.raises(RetraceError, match=r"another model than .* layer 0 .* 4 kv heads of 2"):
        analyze(fewer, plan, keep_exact=False)
    more = make_trace([rules(heads=8, kv_heads=4)] * 3, [60, 40, 50])
    with pytest.raises(RetraceError, match=r"says nothing of layer 2 of .*, only of 0, 1"):
        analyze(more, plan, keep_exact=False)


def test_what_cannot_be_right_is_refused(trace: Trace) -> None:
    plan = planned(trace)
    small = planned(trace, [Setting("window", 2)] * 8)
    with pytest.raises(RetraceError, match="min_context each counts other queries for each budget"):
        analyze(trace, small, min_context="each", keep_exact=False)
    with pytest.raises(RetraceError, match="prefill:8 asks for whole blocks"):
        analyze(trace, plan, protocol="prefill:8", keep_exact=False)
    with pytest.raises(RetraceError, match="name those of this one"):
        show(trace, plan, layer=0, head=0, position=30)
    with pytest.raises(RetraceError, match=r"names ./mine.py:Mine, and plans run installed"):
        analyze(trace, planned(trace, [Setting("./mine.py:Mine", 3)] * 8), keep_exact=False)


LATENT: dict[str, Any] = {
    "heads": 8, "kv_heads": 4, "key_dim": 24, "value_dim": 16, "cached_bytes": (16 + 8) * 2,
}  # fmt: skip


@pytest.mark.parametrize("method", ["quest:page=4", "exact", "window"])
def test_one_method_everywhere_is_that_method(
    make_trace: MakeTrace, rules: Any, method: str
) -> None:
    """Also where the heads of a layer share one cache, whose bytes are counted over all of them."""
    trace = make_trace([rules(**LATENT)] * 2, [60, 40, 50])
    plan = planned(trace, [Setting(method, 5)] * 8)
    options: dict[str, Any] = {"min_context": 22, "keep_exact": False}
    found, alone = (analyze(trace, m, [5], **options) for m in (plan, method))
    for name in ("metrics", "sequences", "positions", "tails"):
        ours, theirs = (
            getattr(one, name).drop(columns="method").reset_index(drop=True)
            for one in (found, alone)
        )
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_mixed_heads_of_a_shared_cache(make_trace: MakeTrace, rules: Any) -> None:
    """Budgets other than the plan's largest are counted too: full attention in one head reads all
    of the cache."""
    trace = make_trace(rules(**LATENT), [60, 40])
    options: dict[str, Any] = {"min_context": 22, "keep_exact": False}
    few = planned(trace, [Setting("window", 5), *[Setting("window", 4)] * 3])
    ratios = {}
    for name, plan in (
        ("few", few),
        ("one full", planned(trace, [Setting("dense"), *[Setting("window", 4)] * 3])),
    ):
        rows = analyze(trace, plan, **options).metrics
        ratios[name] = rows.loc[rows["metric"] == "bytes_ratio", "mean"].mean()
    assert 0.05 < ratios["few"] < 0.3 and ratios["one full"] == pytest.approx(1)
