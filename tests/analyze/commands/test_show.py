"""One query shown: against the definitions, and against what it comes to among all of a run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import OneQuery, analyze, show
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
FIGURES = ("recall", "attended_recall", "attention_fraction", "exact_attention_fraction")
CALIBRATED = "loki"


def attended(query: OneQuery, method: str) -> list[int]:
    rows = query.keys[(query.keys["method"] == method) & query.keys["attended"]]
    return [int(key) for key in rows["key"]]


def test_against_the_definitions(make_trace: MakeTrace, any_rules: Any, queries_of: Any) -> None:
    """Every head of a few queries, under every kind of rule."""
    trace = make_trace(any_rules, [60])
    k = 5
    for group in queries_of(trace):
        if group[0].position not in (2, 31, 59):
            continue
        for query in group:
            found = show(
                trace, ["exact", "window"], k, layer=0, head=query.head, position=query.position
            )
            assert found.visible == len(query.visible)
            top = query.top(k)
            best = found.best()
            assert best["key"].tolist() == top and best["rank"].tolist() == [
                i + 1 for i in range(len(top))
            ]
            np.testing.assert_allclose(best["probability"], query.probabilities[top], atol=1e-6)
            for method, figures in zip(
                ("exact", "window"), found.figures.to_dict("records"), strict=True
            ):
                ids = attended(found, method)
                right = query.figures(ids, k)
                for name in (*FIGURES, "error_norm", "density"):
                    assert figures[name] == pytest.approx(right[name], abs=2e-5), (method, name)
                assert figures["best_taken"] == len(set(ids) & set(top))
                assert figures["best_taken"] + figures["best_missed"] == len(top)
                assert best[method].tolist() == [key in ids for key in top]
            assert set(attended(found, "exact")) == set(top)


@pytest.mark.parametrize(
    ("protocol", "methods"),
    [
        (
            "all",
            ["exact", "random", "quest:page=4", "sparq", "oracle-value", "dense:cache=int4:32"],
        ),
        ("all:16", ["clusterkv", "flat", "pqcache", "loki:basis=own"]),
        ("prefix:60", ["snapkv", "infllm:block=8", "retrieval-attention", "lessismore"]),
        ("decode:8:from=40", ["h2o", "tova", "quest:page=4"]),
        ("prefill:16", ["block-oracle:block=4", "a-shape:block=4", "exact"]),
    ],
)
def test_a_query_comes_to_what_it_does_in_a_run(
    make_trace: MakeTrace, rules: Any, protocol: str, methods: list[str]
) -> None:
    """The worst queries of a run, whose figures it keeps; with states of earlier queries."""
    if protocol.startswith("prefill"):
        methods = methods[:-1]
    trace = make_trace(rules(heads=4, kv_heads=2, key_dim=32, value_dim=32), [130, 90])
    results = analyze(trace, methods, [8], protocol=protocol, min_context=48)
    worst = results.tails
    for row in worst[worst["head"].isin([0, 3])].to_dict("records"):
        found = show(
            trace,
            [row["method"]],
            8,
            layer=0,
            head=row["head"],
            sequence=row["worst_sequence"],
            position=row["worst_position"],
            protocol=protocol,
        )
        figure = found.figures[row["metric"]].item()
        assert np.float32(figure) == pytest.approx(row["worst"], rel=1e-5, abs=1e-7), row
        assert (found.keys["key"] <= row["worst_position"]).all()


def test_a_method_that_learns(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [80, 70, 60])
    results = analyze(trace, [CALIBRATED], [4], min_context=40)
    row = results.tails.iloc[-1]
    place = {"layer": 0, "head": int(row["head"]), "position": int(row["worst_position"])}
    found = show(trace, [CALIBRATED], 4, sequence=int(row["worst_sequence"]), **place)
    assert found.figures[row["metric"]].item() == pytest.approx(row["worst"], rel=1e-5)
    with pytest.raises(RetraceError, match="Methods learn from sequence 2: name another one"):
        show(trace, [CALIBRATED], 4, sequence=2, **place)
    assert show(trace, [CALIBRATED], 4, **place).sequence == 0
    held = show(trace, [CALIBRATED], 4, calibration_sequences=[0], **place)
    assert held.sequence == 1


def test_only_what_the_query_sees(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [50])
    asked: set[int] = set()

    def texts(ids: Sequence[int]) -> list[str]:
        asked.update(ids)
        return [f"<{token}>" for token in ids]

    tokens = trace.tokens(0).tolist()
    found = show(trace, "exact", 3, layer=0, head=1, position=20, texts=texts)
    assert asked <= set(tokens[:21])
    assert found.tokens["position"].tolist() == [*range(21)]
    assert found.tokens["text"].tolist() == [f"<{token}>" for token in tokens[:21]]
    for row in found.keys.to_dict("records"):
        key = row["key"]
        assert row["token"] == tokens[key] and row["text"] == f"<{tokens[key]}>"
        near = tokens[max(0, key - 2) : min(key + 3, 21)]
        assert row["around"] == "".join(f"<{token}>" for token in near)


def test_its_tables(make_trace: MakeTrace, rules: Any) -> None:
    found = show(make_trace(rules(), [50]), ["exact", "window"], 3, layer=0, head=1, position=20)
    table = found.table()
    assert (table["topk"] == 3).all() and (table["position"] == 20).all()
    told = found.to_json()
    assert len(told["keys"]) == len(table) and told["figures"][0]["method"] == "exact"
    missing = found.keys["rank"].isna()
    assert missing.any()
    assert [row["rank"] is None for row in told["keys"]] == missing.tolist()
    assert pd.isna(table.loc[missing, "rank"]).all()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"layer": 7, "head": 0, "position": 9}, "has no layer 7"),
        ({"layer": 0, "head": 2, "position": 9}, "Layer 0 has no head 2: expected 0 to 1"),
        ({"layer": 0, "head": -1, "position": 9}, "Layer 0 has no head -1"),
        ({"layer": 0, "head": 0, "position": 9, "sequence": 3}, "no finished sequence 3; it has 0"),
        (
            {"layer": 0, "head": 0, "position": 10},
            "no query at position 10; near it are those at 7, 9, 11",
        ),
        (
            {"layer": 0, "head": 0, "position": 9, "protocol": "prefix:20"},
            "asks the queries from position 20 on, and not the one at 9",
        ),
    ],
)
def test_refused(make_trace: MakeTrace, rules: Any, place: Any, words: str) -> None:
    kept = [3, 5, 7, 9, 11, 30]
    trace = make_trace(rules(), [40], queries=[kept])
    with pytest.raises(RetraceError, match=words):
        show(trace, "exact", 2, **place)
