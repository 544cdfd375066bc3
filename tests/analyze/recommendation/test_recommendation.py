"""A recommendation is what trying every setting comes to, on sequences that verify nothing."""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean, variance
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from retrace.analyze import Plan, Recommendation, recommend
from retrace.analyze.recommendation.head_classes import CLASSES
from retrace.analyze.recommendation.recommendation import AT_MOST, Target
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
LENGTH, TOPK, METHODS = 48, (5, 8, 16), ["window", "exact"]
HALVES = {"choose": (0, 2), "verify": (1, 3)}


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    return make_trace([rules(heads=4), rules(heads=4, window=21)], [LENGTH] * 4)


def keys_of(method: str, query: Any, k: int) -> list[int]:
    """What a method attends, by its definition."""
    if method == "exact":
        return list(query.top(k))
    visible = list(map(int, query.visible))
    sinks = [j for j in visible if j < 4]
    return sinks + [j for j in visible if j not in sinks][-(k - len(sinks)) :]


def bytes_read(method: str, union: int, visible: int) -> float:
    """Over those of full attention; keys and values are of one size."""
    return (visible + union) / (2 * visible) if method == "exact" else union / visible


@cache
def tried(queries_of: Any, trace: Trace) -> dict[Any, dict[str, Any]]:
    """For every (layer, kv head, method, budget): each figure's means of every head and sequence,
    one query after another."""
    found: dict[Any, dict[str, Any]] = {}
    for layer in trace.layers:
        samples: Any = defaultdict(list)
        groups, kv_heads = queries_of(trace, layer), trace.layer(layer).rules.kv_heads
        for number, group in enumerate(groups):
            sequence, kv_head = divmod(number // LENGTH, kv_heads)
            if group[0].position < LENGTH // 2:
                continue
            for method in METHODS:
                for k in TOPK:
                    chosen = [keys_of(method, query, k) for query in group]
                    union = len(set().union(*chosen))
                    for query, ids in zip(group, chosen, strict=True):
                        figures = query.figures(ids, k)
                        figures["bytes_ratio"] = bytes_read(method, union, len(query.visible))
                        for metric, figure in figures.items():
                            at = (layer, kv_head, method, k)
                            samples[at, metric, query.head, sequence].append(figure)
        for (at, metric, head, sequence), values in samples.items():
            heads = found.setdefault(at, {}).setdefault(metric, {})
            heads.setdefault(head, {})[sequence] = np.mean(values)
    return found


def plain_bounds(heads: list[list[float]], new: int) -> list[float]:
    """What the means of `new` sequences keep, from the losses of some sequences of each head."""
    n = len(heads[0])
    relative = [variance(x) / mean(x) ** 2 if any(x) else 0.0 for x in heads]
    varied = [v for v in relative if v > 0]
    lent, prior, most = 0.0, 0.0, (n - 1) * len(varied)
    if len(varied) > 1:
        half = (n - 1) / 2
        logs = [np.log(v) - special.digamma(half) + np.log(half) for v in varied]
        apart = variance(logs) - special.polygamma(1, half)
        low, high = 1e-6, most / 2
        for _ in range(100):  # the trigamma function falls
            middle = (low + high) / 2
            low, high = (middle, high) if special.polygamma(1, middle) > apart else (low, middle)
        lent = 2 * high
        prior = np.exp(mean(logs) + special.digamma(lent / 2) - np.log(lent / 2))
    bounds = []
    for losses, own in zip(heads, relative, strict=True):
        drawn, freedom = own, float(n - 1)
        if own > 0:
            drawn = (lent * prior + (n - 1) * own) / (lent + n - 1)
            freedom = min(lent + n - 1, most)
        reach = stats.t.ppf(1 - 0.05 / len(heads), freedom)
        bounds.append(mean(losses) * np.exp(reach * np.sqrt(drawn * (1 / n + 1 / new))))
    return bounds


def bounds_of_settings(found: dict[Any, Any], wanted: Target) -> dict[Any, dict[int, float]]:
    """The bound, as a loss, of every head by (layer, method, budget)."""
    losses: dict[Any, dict[Any, list[float]]] = defaultdict(dict)
    for (layer, _, method, k), figures in found.items():
        for head, by_sequence in figures[wanted.metric].items():
            each = [float(wanted.loss(by_sequence[s])) for s in HALVES["choose"]]
            losses[method, k][layer, head] = each
    bounds: dict[Any, dict[int, float]] = defaultdict(dict)
    for (method, k), heads in losses.items():
        plain = plain_bounds(list(heads.values()), len(HALVES["verify"]))
        for (layer, head), bound in zip(heads, plain, strict=True):
            bounds[layer, method, k][head] = bound
    return bounds


@pytest.mark.parametrize(
    "target",
    [
        "error_norm=0.9",
        "error_norm=0.3",
        "attention_fraction=0.8",
        "recall=0.6",
        "bytes_ratio=0.5",
    ],
)
def test_against_trying_everything(queries_of: Any, trace: Trace, target: str) -> None:
    wanted = Target.parse(target)
    found = recommend(trace, target, METHODS, TOPK, keep_exact=False)
    settings = tried(queries_of, trace)
    bounds = bounds_of_settings(settings, wanted)
    best: dict[Any, Any] = {}
    for (layer, kv_head, method, k), figures in settings.items():
        heads = figures[wanted.metric].values()
        bound = max(bounds[layer, method, k][head] for head in figures[wanted.metric])
        means = {
            metric: np.mean(
                [head[s] for head in figures[metric].values() for s in HALVES["choose"]]
            )
            for metric in ("bytes_ratio", "error_norm")
        }
        cost = means["error_norm" if wanted.metric == "bytes_ratio" else "bytes_ratio"]
        verify = [np.mean([head[s] for s in HALVES["verify"]]) for head in heads]
        if bound <= wanted.loss(wanted.value) and means["bytes_ratio"] < 1:
            setting = (cost, method, k, means["bytes_ratio"], verify)
            best[layer, kv_head] = min(best.get((layer, kv_head), setting), setting)
    rows = found.kv_heads.set_index(["layer", "kv_head"])
    assert len(rows) == 4
    for at, row in rows.iterrows():
        if at not in best:
            assert not row["chosen"]
            continue
        _, method, k, read, verify = best[at]
        assert (row["method"], row["topk"], row["chosen"]) == (method, k, True)
        assert row["bytes_ratio"] == pytest.approx(read, rel=1e-5)
        heads = found.heads[(found.heads.layer == at[0]) & (found.heads.kv_head == at[1])]
        np.testing.assert_allclose(heads[f"verify_{wanted.metric}"], verify, rtol=1e-4, atol=2e-5)
    assert 0 < len(best)
    assert wanted.met(found.heads.loc[found.heads.index[rows["chosen"].repeat(2)], "bound"]).all()


def test_heads_that_nothing_suits_keep_full_attention(trace: Trace) -> None:
    found = recommend(trace, "attention_fraction=0.8", METHODS, TOPK, keep_exact=False)
    dense = found.kv_heads[found.kv_heads["method"] == "dense"]
    assert len(dense) and not dense["chosen"].any() and (dense["topk"] == 0).all()
    heads = found.heads.merge(dense[["layer", "kv_head"]])
    assert (heads["verify_error_norm"] == 0).all()
    assert (heads["verify_bytes_ratio"] == 1).all()


def test_the_halves_are_apart(make_trace: MakeTrace, rules: Any, tensors: Any) -> None:
    """Other sequences to verify on leave the choice as it is, and other ones to choose by leave
    the figures of a setting on those that verify."""
    layer = rules(heads=4)

    def made(seeds: list[int], name: str) -> Recommendation:
        given = {
            (0, s): tensors(layer, LENGTH, np.random.default_rng(seed))
            for s, seed in enumerate(seeds)
        }
        trace = make_trace(layer, [LENGTH] * 4, tensors=given, name=name)
        return recommend(trace, "error_norm=0.9", ["exact"], [8], keep_exact=False)

    first = made([1, 2, 3, 4], "first")
    other_verify, other_choose = made([1, 12, 3, 14], "verify"), made([11, 2, 13, 4], "choose")
    assert (first.facts["choose"], first.facts["verify"]) == ([0, 2], [1, 3])
    choose = [c for c in first.heads if c.startswith("choose_")]
    verify = [c.replace("choose", "verify") for c in choose]
    pd.testing.assert_frame_equal(first.kv_heads, other_verify.kv_heads)
    pd.testing.assert_frame_equal(first.heads[choose], other_verify.heads[choose])
    assert not np.allclose(first.heads[verify], other_verify.heads[verify])
    same = (first.kv_heads["method"] == other_choose.kv_heads["method"]).repeat(2).to_numpy()
    assert same.any()
    pd.testing.assert_frame_equal(
        first.heads.loc[same, verify], other_choose.heads.loc[same, verify]
    )


def test_sequences_that_methods_learn_from_are_in_neither_half(
    make_trace: MakeTrace, rules: Any
) -> None:
    trace = make_trace(rules(), [30] * 8)
    found = recommend(trace, "error_norm=5", ["loki:rank=4"], [4], keep_exact=False)
    assert found.facts["calibration"] == [6, 7]
    assert (found.facts["choose"], found.facts["verify"]) == ([0, 2, 4], [1, 3, 5])


def test_a_target_out_of_reach_names_the_nearest(trace: Trace) -> None:
    with pytest.raises(
        RetraceError, match=r"error_norm at most 0.0001 .*nearest is exact, top-k 16"
    ):
        recommend(trace, "error_norm=0.0001", METHODS, TOPK, keep_exact=False)
    with pytest.raises(
        RetraceError, match=r"bytes_ratio at most 0.01 .*nearest is window, top-k 5"
    ):
        recommend(trace, "bytes_ratio=0.01", METHODS, TOPK, keep_exact=False)


def test_too_few_sequences(make_trace: MakeTrace, rules: Any) -> None:
    with pytest.raises(RetraceError, match="at least 3 sequences, two to choose by"):
        recommend(make_trace(rules(), [30, 30]), "recall=0.1", keep_exact=False)
    with pytest.raises(RetraceError, match="at least 3 sequences besides 1 for calibration"):
        recommend(make_trace(rules(), [30] * 3), "recall=0.1", ["loki"], keep_exact=False)


def test_sequences_without_queries_that_count(
    make_trace: MakeTrace, rules: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trace = make_trace(rules(), [40, 20, 40, 40, 40, 10, 40, 40, 40, 40])
    found = recommend(trace, "recall=0.1", ["exact"], [8], min_context=25, keep_exact=False)
    assert (found.facts["choose"], found.facts["verify"]) == ([0, 3, 6, 8], [2, 4, 7, 9])
    assert not caplog.messages
    with pytest.raises(RetraceError, match="has 0 with queries from position 50 on"):
        recommend(trace, "recall=0.1", ["exact"], [8], min_context=50, keep_exact=False)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("error=0.1", "Did you mean error_norm?"),
        ("density=0.1", "Targets: recall, attention"),
        ("recall", "a number above 0 and at most 1"),
        ("attention_fraction=95", "at most 1, as in attention_fraction=0.1"),
        ("error_norm=-1", "a number above 0"),
        ("error_norm=nan", "a number above 0"),
    ],
)
def test_targets_that_are_none(target: str, words: str) -> None:
    with pytest.raises(RetraceError) as error:
        Target.parse(target)
    assert words in str(error.value)


def test_methods_that_lean_on_other_layers_are_refused(trace: Trace) -> None:
    with pytest.raises(RetraceError, match="tidaldecode takes its choice from other layers"):
        recommend(trace, "recall=0.1", ["tidaldecode"], keep_exact=False)


def test_the_file(trace: Trace, tmp_path: Path) -> None:
    found = recommend(trace, "error_norm=0.1", METHODS, TOPK, keep_exact=False)
    found.save(tmp_path / "r.json")
    read = Recommendation.load(tmp_path / "r.json")
    assert read.facts == json.loads(json.dumps(found.facts))
    pd.testing.assert_frame_equal(read.kv_heads, found.kv_heads)
    pd.testing.assert_frame_equal(read.heads, found.heads)
    pd.testing.assert_frame_equal(read.table(), found.table())
    page = (Path(__file__).parents[3] / "docs/recommend.md").read_text(encoding="utf-8")
    content = json.loads((tmp_path / "r.json").read_text())
    [group, *_] = content["layers"][0]["kv_heads"]
    for name in (*content, *content["layers"][0], *group, *group["heads"][0]):
        assert f"`{name.replace('verify_', 'choose_')}`" in page, name
    (tmp_path / "r.json").write_text(json.dumps({**content, "retrace_recommendation": 99}))
    with pytest.raises(RetraceError, match="99"):
        Recommendation.load(tmp_path / "r.json")
    with pytest.raises(RetraceError, match="not a recommendation"):
        Recommendation.load(tmp_path / "nowhere.json")


def test_classes_of_heads(make_trace: MakeTrace, rules: Any) -> None:
    """Heads built so that their attention is where the class says."""
    length, channels = 300, 8
    layer = rules(heads=4, kv_heads=4, scale=1.0)
    query = np.zeros((4, length, channels))
    query[:, :, 0] = 1
    angle = np.arange(length) * (np.pi / 2 / length)
    key = np.zeros((4, length, channels))
    key[0, :4, 0] = 12  # on the sinks
    key[1, :, :2] = 3000 * np.stack([np.cos(angle), np.sin(angle)], -1)  # on those of like angle
    query[1, :, :2] = np.stack([np.cos(angle), np.sin(angle)], -1)
    key[2, 10:100:9, 0] = 12  # on ten in the midst; of head 3, on all alike
    value = np.random.default_rng(0).normal(size=key.shape)
    trace = make_trace(
        layer, [length] * 3, tensors={(0, s): (query, key, value) for s in range(3)}, name="own"
    )
    found = recommend(trace, "recall=0.001", ["exact"], [64], keep_exact=False)
    assert list(found.heads["class"]) == list(CLASSES)
    assert set(AT_MOST) >= {found.target.metric}


@pytest.mark.parametrize("target", ["error_norm=0.5", "attention_fraction=0.8", "bytes_ratio=0.6"])
def test_the_whole_model_against_trying_everything(
    queries_of: Any, trace: Trace, target: str
) -> None:
    """Every choice of a setting for each kv head, full attention among them, is tried."""
    wanted = Target.parse(target)
    found = recommend(trace, target, METHODS, TOPK, over="model", keep_exact=False)
    settings = tried(queries_of, trace)
    budgeted = wanted.metric == "bytes_ratio"
    loss_metric = "error_norm" if budgeted else wanted.metric
    options: dict[Any, list[Any]] = defaultdict(list)
    for (layer, kv_head, method, k), figures in settings.items():

        def of(metric: str, figures: Any = figures) -> Any:
            heads = [[head[s] for s in HALVES["choose"]] for head in figures[metric].values()]
            return np.mean(heads, axis=0)

        loss = of(loss_metric)
        loss = loss if budgeted else np.clip(wanted.loss(loss), 0, None)
        if of("bytes_ratio").mean() < 1:
            options[layer, kv_head].append((method, k, of("bytes_ratio"), loss))
    for own in options.values():
        own.append(("dense", 0, np.ones(2), np.zeros(2)))
    choices: dict[str, Any] = {}
    for chosen in itertools.product(*(options[at] for at in sorted(options))):
        read, lost = (np.mean([one[i] for one in chosen], axis=0) for i in (2, 3))
        [bound] = plain_bounds([[*(read if budgeted else lost)]], len(HALVES["verify"]))
        choices[str([one[:2] for one in chosen])] = read.mean(), lost.mean(), bound
    rows = found.kv_heads[["method", "topk"]].itertuples(index=False, name=None)
    read, lost, bound = choices[str([*rows])]
    told, almost = found.facts["together"], 1 - 1e-5
    assert 0 < lost and read < 1
    limit = wanted.value if budgeted else float(wanted.loss(wanted.value))
    reached = told["bound"] if budgeted else float(wanted.loss(told["bound"]))
    assert reached == pytest.approx(bound, rel=1e-4) and bound <= limit
    # Nothing is better that loses, or reads, no more on the half that chooses.
    assert min(r for r, x, _ in choices.values() if x <= lost) > read * almost
    assert min(x for r, x, _ in choices.values() if r <= read) > lost * almost
    if budgeted:
        assert told["least"] <= min(x for r, x, _ in choices.values() if r <= limit) / almost
    else:
        allowed = lost * limit / bound
        best = min(r for r, x, _ in choices.values() if x <= allowed)
        assert told["least"] <= best / almost and best <= read
        assert found.kv_heads["bytes_ratio"].mean() == pytest.approx(read, rel=1e-4)


def test_one_method_for_a_layer(trace: Trace, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"keep_exact": False}
    found = recommend(
        trace, "error_norm=0.9", METHODS, TOPK, share="layer", budgets="layer", **shared
    )
    assert (found.kv_heads.groupby("layer")[["method", "topk"]].nunique() == 1).all(axis=None)
    assert found.facts["share"] == {"methods": "layer", "budgets": "layer"}
    with pytest.raises(RetraceError, match="over 'model': expected head or model, and over"):
        recommend(trace, "error_norm=0.9", METHODS, TOPK, share="layer", over="model", **shared)


def test_budgets_as_fractions(
    make_trace: MakeTrace, rules: Any, trace: Trace, tmp_path: Any
) -> None:
    """They come to the budgets that were tried, on sequences as long as those."""
    found = recommend(trace, "error_norm=0.9", METHODS, TOPK, fractions=True, keep_exact=False)
    found.save(tmp_path / "r.json")
    plan = Plan.load(tmp_path / "r.json")
    assert found.facts["context"] == LENGTH
    for row in found.kv_heads.to_dict("records"):
        setting = plan.of(row["layer"], row["kv_head"])
        if not setting.full:
            assert setting.fraction == row["topk"] / LENGTH
            assert setting.budget(LENGTH) == row["topk"]
            assert setting.budget(2 * LENGTH) == 2 * row["topk"]
    pd.testing.assert_frame_equal(
        Recommendation.load(tmp_path / "r.json").kv_heads, found.kv_heads, check_like=True
    )
    uneven = make_trace(rules(), [40, 50, 40, 40])
    with pytest.raises(RetraceError, match="the sequences have from 40 to 50 positions"):
        recommend(uneven, "recall=0.1", ["exact"], [8], fractions=True, keep_exact=False)
