"""The table of locality, from whole runs, against the definitions in sets and dictionaries."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Results, analyze, estimate, merge
from retrace.analyze.outputs.plots.locality import locality_figures
from retrace.traces import RetraceError, Trace

pytestmark = pytest.mark.usefixtures("untried")
MakeTrace = Callable[..., Trace]
LENGTHS = (53, 1, 40)
KEYS = ["cache", "head", "topk", "metric", "at"]


def sinks_and_newest(query: Any, k: int) -> list[int]:
    """The first four positions, the query's own, and the newest others while there is budget."""
    newest = [query.position, *range(query.position - 1, 3, -1)]
    ids = [*range(min(4, query.position + 1)), *newest[: max(1, k - 4)]]
    return list(dict.fromkeys(ids))


def loaded(lists: Sequence[set[int]], positions: Sequence[int], size: int) -> list[int]:
    """How many keys each query finds missing in a buffer of this size, empty at first."""
    buffer: OrderedDict[int, None] = OrderedDict()
    found = []
    for keys, position in zip(lists, positions, strict=True):
        found.append(len(keys - buffer.keys() - {position}))
        for key in sorted(keys | {position}):
            buffer.pop(key, None)
            buffer[key] = None
            if len(buffer) > size:
                buffer.popitem(last=False)
    return found


def figures(sequences: Sequence[Sequence[set[int]]], first: int, each: int) -> dict[Any, Any]:
    """Mean and count by metric and `at` of a cache, from the keys that each query attends."""
    kinds = dict.fromkeys(("repeated", "returned", "first_read", "just_written"), 0)
    queries = attended = 0
    missed: dict[int, int] = dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 0)
    working: dict[int, list[int]] = {1 << i: [] for i in range(9)}
    for lists in sequences:
        positions = range(first, first + len(lists))
        for size in missed:
            missed[size] += sum(loaded(lists, positions, size)[1:])
        for span, sets in working.items():
            sets += [len(set().union(*lists[i : i + span])) for i in range(len(lists) - span + 1)]
        for now in range(1, len(lists)):
            before, position = set().union(*lists[:now]), first + now
            queries += 1
            attended += len(lists[now])
            kinds["repeated"] += len(lists[now] & lists[now - 1])
            kinds["returned"] += len((lists[now] & before) - lists[now - 1])
            kinds["just_written"] += position in lists[now]
            kinds["first_read"] += len(lists[now] - before - {position})
    old = attended - kinds["just_written"]
    found = {(kind, 0): (count / attended, queries) for kind, count in kinds.items()}
    for size, count in missed.items():
        found["misses", size] = count / queries, queries
        found["link_bytes", size] = each * count / queries, queries
        if old:
            found["hit_rate", size] = 1 - count / old, queries
    for span, sizes in working.items():
        if sizes:
            found["working_set", span] = np.mean(sizes), len(sizes)
    return found


METHODS: dict[str, tuple[Callable[[Any, int], list[int]], int]] = {
    "exact": (lambda query, k: query.top(k), 2 * 8),
    "window": (sinks_and_newest, 2 * (8 + 8)),
}
"""What they attend, and the bytes of what they read of one key: the values alone after ranking."""


@pytest.mark.parametrize(
    "changes",
    [{"heads": 4, "kv_heads": 2}, {"heads": 3, "kv_heads": 1}, {"window": 13}],
    ids=str,
)
def test_as_defined(make_trace: MakeTrace, rules: Any, queries_of: Any, changes: Any) -> None:
    trace = make_trace(rules(**changes), LENGTHS)
    layer = trace.layer(0).rules
    if "window" in changes:  # it knows nothing of windows here
        methods = {"exact": METHODS["exact"]}
    else:
        methods = METHODS
    results = analyze(trace, list(methods), [2, 5], min_context=13, locality=True, keep_exact=False)
    assert set(results.locality["module"]) == {"model.layers.0"}
    for method, (select, each) in methods.items():
        rows = results.locality[results.locality["method"] == method]
        found = rows.astype({n: "str" for n in ("cache", "metric")}).set_index(KEYS)
        assert found.index.is_unique
        seen = 0
        for k in (2, 5):
            lists: dict[int, dict[int, list[set[int]]]] = {}
            groups = [group for group in queries_of(trace) if group[0].position >= 13]
            for group in groups:
                for query in group:
                    of_head = lists.setdefault(query.head, {})
                    of_head.setdefault(len(query.keys), []).append(set(select(query, k)))
            sequences = {head: list(each.values()) for head, each in lists.items()}
            caches: dict[Any, Any] = {("head", head): own for head, own in sequences.items()}
            for kv_head in range(layer.kv_heads):
                heads = [sequences[kv_head * layer.group + i] for i in range(layer.group)]
                caches["group", kv_head] = [
                    [set().union(*each) for each in zip(*of_heads, strict=True)]
                    for of_heads in zip(*heads, strict=True)
                ]
            for (cache, head), own in caches.items():
                for (metric, at), (mean, count) in figures(own, 13, each).items():
                    row = found.loc[(cache, head, k, metric, at)]
                    assert row["mean"] == pytest.approx(mean, rel=1e-12), (cache, head, metric, at)
                    assert row["count"] == count
                    seen += 1
                if cache == "group":
                    together = [sequences[head * layer.group + i] for i in range(layer.group)]
                    parts = sum(len(x) for of_head in together for s in of_head for x in s[1:])
                    whole = sum(len(x) for s in own for x in s[1:])
                    share = found.loc[("group", head, k, "distinct", 0), "mean"]
                    assert share == pytest.approx(whole / parts)
                    seen += 1
                    shared = [
                        len(a & b)
                        for one, other in itertools.permutations(together, 2)
                        for theirs in zip(one, other, strict=True)
                        for a, b in zip(*(part[1:] for part in theirs), strict=True)
                    ]
                    if layer.group > 1:
                        share = found.loc[("group", head, k, "overlap", 0), "mean"]
                        assert share == pytest.approx(sum(shared) / parts / (layer.group - 1))
                        seen += 1
        assert seen == len(found)


def test_shares_come_to_one_and_buffers_nest(make_trace: MakeTrace, rules: Any) -> None:
    """Of methods of every level, those that are rebuilt and those that evict among them."""
    trace = make_trace([rules(heads=4, kv_heads=2), rules(window=9)], LENGTHS)
    methods = ["quest:page=4", "loki:basis=own", "tova", "retrieval-attention", "magicpig"]
    results = analyze(trace, methods, [1, 3], protocol="all:16", locality=True, keep_exact=False)
    rows = results.locality
    assert set(rows["method"]) == set(methods)
    by = ["method", "layer", "cache", "head", "topk"]
    kinds = rows[rows["metric"].isin(["repeated", "returned", "first_read", "just_written"])]
    sums = kinds.groupby(by, observed=True)["mean"].sum()
    np.testing.assert_allclose(sums, 1.0, rtol=1e-12)
    rates = rows[rows["metric"] == "hit_rate"].sort_values([*by, "at"])
    assert (rates.groupby(by, observed=True)["mean"].diff().dropna() >= 0).all()
    assert rates["mean"].between(0, 1).all() and rates["mean"].nunique() > 20


def test_budgets_may_count_from_positions_of_their_own(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), LENGTHS)
    both = analyze(trace, ["window"], [2, 4], min_context="each", locality=True, keep_exact=False)
    for k in (2, 4):
        alone = analyze(
            trace, ["window"], [k], min_context=10 * k, locality=True, keep_exact=False
        ).locality
        ours = both.locality[both.locality["topk"] == k].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, alone)


def test_any_number_of_workers(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    """The same bytes, in parts too."""
    trace = make_trace([rules(heads=4, kv_heads=2), rules(window=9)], LENGTHS, name="own")
    analyze(trace, ["exact", "quest"], [2, 3], out=tmp_path / "one", workers=1, locality=True)
    with ThreadPoolExecutor(4) as pool:
        analyze(
            trace, ["exact", "quest"], [2, 3], out=tmp_path / "four", executor=pool, locality=True
        )
    for part in (2, 1):
        analyze(trace, ["exact", "quest"], [2, 3], out=tmp_path / "parts", part=(part, 2),
                locality=True)  # fmt: skip
    merge([tmp_path / "parts"])
    tables = {name: (tmp_path / name / "locality.parquet").read_bytes()
              for name in ("one", "four", "parts")}  # fmt: skip
    assert len(Results.load(tmp_path / "one").locality) > 100
    assert tables["one"] == tables["four"] == tables["parts"]


def test_what_is_there_without_is_computed_with(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace, out = make_trace(rules(), LENGTHS, name="own"), tmp_path / "r"
    analyze(trace, ["exact", "window"], [2], out=out)
    assert Results.load(out).locality.empty
    assert estimate(trace, ["exact"], [2], out=out).tasks == 0
    assert estimate(trace, ["exact"], [2], out=out, locality=True).tasks == 3
    analyze(trace, ["exact"], [2], out=out, locality=True)
    analyze(trace, ["exact"], [3], out=out, min_context=20)
    grown = Results.load(out)
    assert grown.followed("exact") == {2} and grown.followed("window") == set()
    before = (out / "run.json").read_bytes()
    again = analyze(trace, ["exact"], [2], out=out, locality=True)
    assert (out / "run.json").read_bytes() == before
    pd.testing.assert_frame_equal(again.locality, grown.locality)
    # Computed again without, what it was is nobody's figure any more.
    caplog.clear()
    assert analyze(trace, ["exact"], [2], out=out, again=True).followed("exact") == set()
    assert "exact at 2 is measured again, and its locality is dropped" in caplog.text


def test_kept_parts_without_are_not_taken(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace, out = make_trace(rules(), LENGTHS, name="own"), tmp_path / "r"
    analyze(trace, ["exact"], [2], out=out, part=(1, 2))
    analyze(trace, ["exact"], [2], out=out, part=(1, 2), locality=True)
    with pytest.raises(RetraceError, match="parts are missing"):
        merge([out])
    analyze(trace, ["exact"], [2], out=out, part=(2, 2))
    analyze(trace, ["exact"], [2], out=out, part=(2, 2), locality=True)
    assert merge([out]).methods() == ["exact"]


@pytest.mark.parametrize(
    ("options", "queries", "line"),
    [
        (
            {"protocol": "prefill:8"},
            None,
            r"under prefill:8 the queries of a block share those that a-shape:block=8 chose",
        ),
        (
            {"min_context": 3},
            [(1, 2, 5, 6, 9, 10, 11, 12)],
            r"of sequence 0, .*own\.zarr has one of 6 and the next of 9\. From 9 on it has all",
        ),
        ({"min_context": 11}, None, "two queries that count"),
    ],
    ids=["blocks", "gaps", "one query"],
)
def test_refused(make_trace: MakeTrace, rules: Any, options: Any, queries: Any, line: str) -> None:
    trace = make_trace(rules(), [13 if queries else 12], queries=queries, name="own")
    method = "a-shape:block=8" if "protocol" in options else "exact"
    with pytest.raises(RetraceError, match=line):
        analyze(trace, [method], [1], locality=True, **options)


def test_gaps_before_those_that_count_do_no_harm(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [13], queries=[(1, 2, 5, 6, 9, 10, 11, 12)], name="own")
    found = analyze(trace, ["exact"], [1], locality=True, min_context=9).locality
    assert set(found.loc[found["metric"] == "repeated", "count"]) == {3}


def test_a_cache_that_all_heads_share_has_no_bytes_by_head(
    make_trace: MakeTrace, rules: Any
) -> None:
    trace = make_trace(rules(cached_bytes=24), [40])
    found = analyze(trace, ["exact"], [2], locality=True, keep_exact=False).locality
    assert "misses" in set(found["metric"]) and "link_bytes" not in set(found["metric"])


def test_in_words_and_pictures(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace([rules(heads=4, kv_heads=2)] * 2, LENGTHS)
    results = analyze(
        trace, ["exact", "window"], [1, 5], min_context=20, locality=True, keep_exact=False
    )
    lines = results.locality_summary().set_index("Method, top-k")
    assert list(lines.index) == ["exact, 1", "exact, 5", "window, 1", "window, 5"]
    assert set(lines["Queries"]) == {"51"}
    rows = results.locality
    groups = rows[(rows["cache"] == "group") & (rows["method"] == "exact") & (rows["topk"] == 5)]
    means = groups.groupby(["metric", "at"], observed=True)["mean"].mean()
    assert lines.loc["exact, 5", "Repeated"] == f"{means['repeated', 0]:.4f}"
    rates = means["hit_rate"]
    size = min(n for n in rates.index if rates[n] >= 0.9)
    assert lines.loc["exact, 5", "Keys For 90% Hits"] == str(size)
    assert lines.loc["exact, 5", "Link Bytes Then"] == f"{means['link_bytes', size]:,.0f}"
    assert list(results.locality_summary(["exact"], [5])["Method, top-k"]) == ["exact, 5"]
    assert "| window, 5 | 51 |" in results.markdown()
    drawn = {file.name for file in results.draw(tmp_path / "with")}
    without = analyze(trace, ["exact"], [1], min_context=20, keep_exact=False)
    assert without.locality_summary().empty and "Repeated" not in without.markdown()
    assert drawn - {file.name for file in without.draw(tmp_path / "without")} >= {
        "buffer-hits.png",
        "buffer-link.png",
    }
    figure = locality_figures(results)["buffer-link"](None)
    line = next(x for x in figure.axes[1].lines if x.get_label() == "exact")
    np.testing.assert_allclose(line.get_ydata(), means["link_bytes"])


def test_a_query_that_attends_its_own_position_alone(make_trace: MakeTrace, rules: Any) -> None:
    """It looks nothing up, and there is no rate of nothing."""
    trace = make_trace(rules(window=1), [24])
    results = analyze(trace, ["exact"], [1], locality=True, keep_exact=False)
    assert "hit_rate" not in set(results.locality["metric"])
    [line] = results.locality_summary().to_dict("records")
    assert (line["Just Written"], line["Keys For 90% Hits"]) == ("1.0000", "-")
