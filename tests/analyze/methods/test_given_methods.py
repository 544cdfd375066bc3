"""Methods as objects, classes, functions and by labels; and answers and code that are wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from retrace.analyze import ScoreMethod, analyze, calibrate, estimate, recommend
from retrace.analyze.methods.quest import Quest
from retrace.cli.main import main
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
PLACE = r"layer 0, head 0, sequence 0, position \d+"


@dataclass(frozen=True, kw_only=True)
class ByFactor(ScoreMethod):
    """Exact scores, times a number."""

    factor: float = 1.0

    def build(self, past: Any) -> Any:
        """The keys."""
        return past.keys

    def scores(self, state: Any, queries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of all keys."""
        scores: torch.Tensor = self.factor * (queries @ state.T)
        return scores


def last_key(query: Any, key: Any, value: Any, attention_mask: Any, head_mask: Any) -> Any:
    """Attends the query's own key."""
    own = (attention_mask[0, 0] == 0).cumsum(dim=-1).argmax(dim=-1)
    ids = own[:, None].expand(*query.shape[:3], 1)
    return value[:, :, own], None, ids


def figures(results: Any, name: str) -> pd.DataFrame:
    """Of one method, without its name."""
    rows = results.metrics
    assert name in set(rows["method"])
    return rows[rows["method"] == name].drop(columns="method").reset_index(drop=True)


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Two sequences of two heads."""
    return make_trace(rules(), [48, 40])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("quest", "quest"),
        (Quest(), "quest"),
        (Quest, "quest"),
        ([Quest(page=8), "exact"], "quest:page=8"),
        (ByFactor, "ByFactor"),
        ([ByFactor(factor=-1.0)], "ByFactor:factor=-1.0"),
        ({"mine": ByFactor(factor=-1.0)}, "mine"),
        ({"small pages": "quest:page=4", "large": Quest(page=32)}, "small pages"),
        ({"large": Quest(page=32), "quest": "quest"}, "large"),
        (last_key, "last_key"),
    ],
)
def test_methods_as_they_come(trace: Trace, given: Any, name: str) -> None:
    results = analyze(trace, given, [2], workers=1, keep_exact=False)
    assert name in results.methods()
    assert estimate(trace, given, [2], keep_exact=False).tasks == 2


def test_a_label_changes_no_figure(trace: Trace, tmp_path: Path) -> None:
    plain = analyze(trace, ["quest:page=4", "quest"], [2], keep_exact=False)
    out = tmp_path / "results"
    analyze(trace, {"a": "quest:page=4"}, [2], out=out, keep_exact=False)
    assert figures(analyze(trace, {"a": "quest:page=4"}, [2], out=out), "a").equals(
        figures(plain, "quest:page=4")
    )
    # The same label for another method is no figure of the first.
    again = analyze(trace, {"a": Quest()}, [2], out=out, keep_exact=False)
    assert figures(again, "a").equals(figures(plain, "quest"))


def test_objects_differ_by_what_they_hold(trace: Trace) -> None:
    def scaled(factor: float) -> Any:
        return lambda *given: last_key(*given[:2], factor * given[2], *given[3:])

    with pytest.raises(RetraceError, match="Two different methods are <lambda>"):
        analyze(trace, [scaled(1.0), scaled(2.0)], [2])
    with pytest.raises(RetraceError, match="label ''"):
        analyze(trace, {"": "quest"}, [2])
    with pytest.raises(RetraceError, match="is for one method"):
        analyze(trace, {"a": "quest:page={4,8}"}, [2])
    with pytest.raises(RetraceError, match=r"5 is no method"):
        analyze(trace, [5], [2])


def test_what_a_file_does_not_tell_is_computed_again(trace: Trace, tmp_path: Path) -> None:
    def scaled(factor: float) -> Any:
        def own(query: Any, key: Any, value: Any, attention_mask: Any, head_mask: Any) -> Any:
            return last_key(query, key, factor * value, attention_mask, head_mask)

        return own

    found = []
    for factor in (1.0, 3.0):
        rows = analyze(trace, scaled(factor), [2], out=tmp_path / "out", workers=1).metrics
        found.append(rows[rows["metric"] == "error_norm"]["mean"].mean())
    assert abs(found[0] - found[1]) > 0.1


def test_friends_take_them_too(make_trace: MakeTrace, rules: Any) -> None:
    many = make_trace(rules(), [48] * 6, name="many")
    found = recommend(many, "recall=0.1", {"x": ByFactor()}, [8], workers=1, keep_exact=False)
    assert "x" in found.facts["methods"]
    assert calibrate(many, {"basis": "loki"}, workers=1)


def test_processes_import_classes_or_refuse(trace: Trace) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Local(ByFactor):
        pass

    assert "Local" in analyze(trace, Local(), [2], workers=1, keep_exact=False).methods()
    with pytest.raises(RetraceError, match=r"^Local is defined in a function.*workers=1"):
        analyze(trace, Local(), [2], workers=2, keep_exact=False)
    with pytest.raises(RetraceError, match=r"^Local: parts are merged by"):
        analyze(trace, Local(), [2], part=(1, 2))
    here = analyze(trace, {"mine": Quest(page=4)}, [2], workers=1, keep_exact=False)
    there = analyze(trace, {"mine": Quest(page=4)}, [2], workers=2, keep_exact=False)
    assert figures(here, "mine").equals(figures(there, "mine"))


WRONG = """
class ByKeys(ScoreMethod):
    def scores(self, state, queries, positions):
        return queries @ state.keys.T


class NoScores(ScoreMethod):
    pass


class NoSearch(SearchMethod):
    def extend(self, state, new):
        return state


class NoExtend(SearchMethod):
    def search(self, state, queries, k):
        return torch.zeros(*queries.shape[:2], 1, dtype=torch.int64)


class NoAttend(AttendMethod):
    pass


class NoDataclass(ByKeys):
    page: int = 4


class NoMethod:
    def scores(self, state, queries, positions):
        return None


class Array(ByKeys):
    def scores(self, state, queries, positions):
        return super().scores(state, queries, positions).numpy()


class Nothing(ByKeys):
    def scores(self, state, queries, positions):
        super().scores(state, queries, positions)


class Whole(ByKeys):
    def scores(self, state, queries, positions):
        return super().scores(state, queries, positions).long()


class NoState(ByKeys):
    def build(self, past):
        past.keys.mean()


class Raises(ByKeys):
    def scores(self, state, queries, positions):
        return self.look_up(positions)

    def look_up(self, positions):
        return [1, 2][int(positions[0]) + 2]


class BuildRaises(ByKeys):
    def build(self, past):
        return past.keys @ past.keys


class FloatIds(NoExtend):
    def extend(self, state, new):
        return state

    def search(self, state, queries, k):
        return super().search(state, queries, k).float()


class OneAnswer(AttendMethod):
    def attend(self, state, queries, positions, k):
        return state.values[positions].expand(len(queries), -1, -1)


class IdsShape(AttendMethod):
    def attend(self, state, queries, positions, k):
        return state.values[positions].expand(len(queries), -1, -1), positions


def two(query, key, value, attention_mask, head_mask):
    return query, None
"""


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("NoScores", r"must define scores\(\)"),
        ("NoSearch", r"must define search\(\)"),
        ("NoExtend", r"must define extend\(\), as every fitted method does"),
        ("NoAttend", r"must define attend\(\)"),
        ("NoDataclass", r": page cannot be set, since NoDataclass is no dataclass"),
        ("NoMethod", r"is a class, but no method: derive it"),
        ("Array", rf"scores\(\) gave a numpy.ndarray at {PLACE}; expected a torch.Tensor"),
        ("Nothing", rf"scores\(\) gave None at {PLACE}; expected a torch.Tensor"),
        ("Whole", rf"scores\(\) gave a tensor of int64 at {PLACE}; expected floating"),
        ("NoState", rf"build\(\) gave None at {PLACE}; expected a state"),
        ("Raises", rf"scores\(\) at {PLACE} raised IndexError: list index out of range"),
        ("BuildRaises", rf"build\(\) at {PLACE} raised RuntimeError: mat1 and mat2"),
        ("FloatIds", rf"search\(\) gave a tensor of float32 at {PLACE}; expected whole numbers"),
        ("OneAnswer", rf"attend\(\) gave no pair of output and ids at {PLACE}"),
        ("IdsShape", rf"attend\(\) gave ids of shape .* at {PLACE}"),
        ("two", r"gave no triple of output, scores and ids"),
    ],
)
def test_wrong_kinds_are_told_in_one_line(
    trace: Trace, write_methods: Any, method: str, message: str
) -> None:
    with pytest.raises(RetraceError, match=rf"^mine\.py:{method}.*{message}") as caught:
        analyze(trace, f"{write_methods(WRONG)}:{method}", [2], workers=1, keep_exact=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_command_shows_the_users_own_lines(
    trace: Trace, write_methods: Any, workers: str
) -> None:
    spec = f"{write_methods(WRONG)}:Raises"
    asked = ["analyze", str(trace.path), "--method", spec, "--topk", "2", "--workers", workers]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2
    assert "mine.py:Raises scores() at layer 0, head 0, sequence 0, position" in done.stderr
    assert "return self.look_up(positions)" in done.stderr
    assert "return [1, 2][int(positions[0]) + 2]" in done.stderr
    assert "IndexError: list index out of range" in done.stderr
    assert "select.py" not in done.stderr and "states.py" not in done.stderr


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("import there_is_none", "import there_is_none"),
        ("@dataclass\nclass Mine(ScoreMethod):\n    page: int = 3", "cannot inherit non-frozen"),
        ("def broken(:", "def broken(:"),
    ],
)
def test_a_file_that_cannot_be_loaded(
    trace: Trace, write_methods: Any, body: str, shown: str
) -> None:
    asked = ["analyze", str(trace.path), "--method", f"{write_methods(body)}:Mine", "--topk", "2"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2 and "could not be loaded" in done.stderr and shown in done.stderr
    assert "specs.py" not in done.stderr and "<frozen" not in done.stderr
