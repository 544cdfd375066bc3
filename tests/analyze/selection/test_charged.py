"""What finding keys reads is charged, or it is said that it is not."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from retrace.analyze import Results, analyze, recommend
from retrace.analyze.methods.registry import method_class, method_names
from retrace.analyze.outputs.plots.costs import error_by_cost
from retrace.analyze.outputs.report.figures import figures_of
from retrace.analyze.outputs.report.packed import Packed
from retrace.analyze.units.costs import NOT_CHARGED
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
Write = Callable[..., str]

METHODS = """
@dataclass(frozen=True, kw_only=True)
class Dots(ScoreMethod):
    def build(self, past):
        return past.keys
    def scores(self, state, queries, positions):
        return queries @ state[: int(positions[-1]) + 1].T

@dataclass(frozen=True, kw_only=True)
class Holds(Dots):
    holds_keys = True

@dataclass(frozen=True, kw_only=True)
class Free(Dots):
    holds_keys = False

@dataclass(frozen=True, kw_only=True)
class Says(Dots):
    each: float = 1.0
    def aux_bytes(self, state, keys, group):
        return keys * self.each

@dataclass(frozen=True, kw_only=True)
class Attended(Dots):
    each: float = 1.0
    holds_keys = True
    def attended_bytes(self, group):
        return self.each

@dataclass(frozen=True, kw_only=True)
class Search(SearchMethod):
    def build(self, past):
        return past.keys
    def extend(self, state, new):
        return torch.cat([state, new.keys])
    def search(self, state, queries, k):
        return (queries @ state.T).topk(min(k, len(state)), dim=-1).indices

def top(query, key, value, attention_mask, head_mask, topk):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + attention_mask
    best, ids = scores.topk(min(topk, scores.shape[-1]), dim=-1)
    weights = torch.zeros_like(scores).scatter(-1, ids, best.softmax(dim=-1))
    return weights @ value, scores, ids.masked_fill(best < -1e30, -1)

def paid(*given, **asked):
    return top(*given, **asked)

def topped(query, key, value, attention_mask, head_mask, topk):
    return top(query, key, value, attention_mask, head_mask, topk)

topped.holds_keys = True
"""
UNCHARGED = ("Dots", "Search", "top")


@pytest.fixture
def mine(write_methods: Write) -> str:
    return write_methods(METHODS)


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    return make_trace(rules(heads=2, kv_heads=1), [60, 50, 64, 55])


def bytes_of(results: Results) -> dict[str, float]:
    rows = results.metrics
    means = rows[rows["metric"] == "bytes_ratio"].groupby("method")["mean"].mean()
    return {str(method): float(mean) for method, mean in means.items()}


def test_all_installed_methods_say_what_they_read() -> None:
    kinds = {name: method_class(name) for name in method_names()}
    silent = [
        name
        for name, kind in kinds.items()
        if kind.holds_keys is None and kind.aux_bytes is method_class("dense").aux_bytes
    ]
    assert not silent


@pytest.mark.parametrize("name", UNCHARGED)
def test_a_method_that_does_not_say_is_told_apart(
    trace: Trace, mine: str, tmp_path: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level(logging.WARNING):
        results = analyze(
            trace,
            [f"{mine}:{name}", f"{mine}:Holds"],
            [4],
            min_context=20,
            keep_exact=False,
            out=tmp_path / "r",
        )
    [line] = [record.getMessage() for record in caplog.records]
    assert f"mine.py:{name}: {NOT_CHARGED}" in line
    assert "aux_bytes" in line and "holds_keys" in line
    for known in (results, Results.load(tmp_path / "r")):
        marked = {m: facts["charged"] for m, facts in known.run["methods"].items()}
        assert marked == {f"mine.py:{name}": False, "mine.py:Holds": True}
        for row in known.summary().itertuples(index=False):
            assert (NOT_CHARGED in row[-1]) == (row[0] == f"mine.py:{name}, 4")
        assert known.markdown().count(NOT_CHARGED) == 1
        legends = error_by_cost(known).legends[0].get_texts()
        words = {" ".join(text.get_text().split()) for text in legends}
        assert sum(NOT_CHARGED in text for text in words) == 1
        labels = [entry["label"] for entry in figures_of({"r": known}, Packed())["entries"]]
        assert f"mine.py:{name} ({NOT_CHARGED})" in labels and "mine.py:Holds" in labels


def test_what_a_method_says_is_counted(trace: Trace, mine: str) -> None:
    names = ("Dots", "Holds", "Free", "Says", "Says:each=0", "topped", "top")
    found = bytes_of(
        analyze(
            trace,
            ["exact", *(f"{mine}:{name}" for name in names)],
            [4],
            min_context=20,
            keep_exact=False,
        )
    )
    exact, dots = found["exact"], found["mine.py:Dots"]
    assert found["mine.py:Holds"] == pytest.approx(exact, rel=0.01)  # ties
    assert found["mine.py:topped"] == pytest.approx(exact, rel=0.01)
    assert found["mine.py:Free"] == found["mine.py:Says:each=0.0"] == dots
    assert found["mine.py:top"] == pytest.approx(dots, rel=0.01)
    # A byte of the eight channels of a key and of a value, two bytes each.
    assert found["mine.py:Says"] - dots == pytest.approx(1 / (16 * 2), rel=1e-6)


@pytest.mark.parametrize("each", ["-1", "nan", "inf"])
@pytest.mark.parametrize("name", ["Says", "Attended"])
def test_bytes_that_cannot_be_are_refused(
    trace: Trace, mine: str, caplog: pytest.LogCaptureFixture, name: str, each: str
) -> None:
    spec, hook = f"{mine}:{name}:each={each}", {"Says": "aux_bytes"}.get(name, "attended_bytes")
    with pytest.raises(RetraceError, match=rf"mine.py:{name}:each=\S+ {hook}\(\) gave -?\w+"):
        analyze(trace, [spec], [4], min_context=20, keep_exact=False)
    with caplog.at_level(logging.WARNING):
        results = analyze(trace, ["exact", spec], [4], min_context=20, keep_exact=False)
    assert results.methods() == ["exact"]
    assert hook in caplog.text and "Left out: mine.py" in caplog.text


def test_a_recommendation_says_what_it_does_not_count(
    trace: Trace, mine: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = recommend(
            trace, "bytes_ratio=0.9", [f"{mine}:Dots", "exact"], [4], keep_exact=False
        )
    assert f"mine.py:Dots: {NOT_CHARGED}" in caplog.text
    assert found.facts["methods"]["mine.py:Dots"]["charged"] is False
    chosen = found.table()["Method"]
    assert (chosen == f"mine.py:Dots, 4 ({NOT_CHARGED})").any()


def test_of_older_results_it_is_known_of_installed_methods_only(trace: Trace, mine: str) -> None:
    results = analyze(trace, ["exact", f"{mine}:Holds"], [4], min_context=20, keep_exact=False)
    for name, facts in results.run["methods"].items():  # as they had it: the digest of a loose file
        del facts["charged"]
        facts["source_digest"] = None if name == "exact" else "0" * 64
    cells = results.summary().set_index("Method, top-k")["Bytes Ratio"]
    assert NOT_CHARGED not in cells["exact, 4"]
    assert NOT_CHARGED in cells["mine.py:Holds, 4"]
