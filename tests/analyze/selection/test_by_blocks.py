"""Blocks of queries that choose keys together: what a method may answer, and where it may."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import Results, analyze, estimate
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]

METHODS = """\
from retrace.analyze import BlockMethod

@dataclass(frozen=True, kw_only=True)
class Mine(BlockMethod):
    'Keys by themselves.'
    block: int = 4

    def units_of(self, positions):
        return -(-(int(positions[-1]) + 1) // self.block)

class Newest(Mine):
    def block_scores(self, state, queries, positions):
        return torch.arange(self.units_of(positions)).float().expand(len(queries), -1)

class Short(Mine):
    def block_scores(self, state, queries, positions):
        return torch.zeros(len(queries), 1)

class Nan(Mine):
    def block_scores(self, state, queries, positions):
        return torch.full((len(queries), self.units_of(positions)), torch.nan)

class Nothing(Mine):
    pass

class Later(Mine):
    def choose(self, state, queries, positions, k):
        return torch.full((len(queries), 1), self.units_of(positions))

class Twice(Mine):
    def choose(self, state, queries, positions, k):
        return torch.zeros(len(queries), 2, dtype=torch.int64)

class OddAlways(Newest):
    def always(self, state, queries, positions):
        return torch.ones(1, 1, dtype=torch.bool)

class Future(Newest):
    def build(self, past):
        return past.keys.sum()

    def block_scores(self, state, queries, positions):
        scores = super().block_scores(state, queries, positions)
        return torch.sin(scores * state)

class End(Future):
    looks = 'end'

class Counter(Newest):
    calls = [0]

    def block_scores(self, state, queries, positions):
        self.calls[0] += 1
        return super().block_scores(state, queries, positions) * (-1) ** self.calls[0]
"""


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    return make_trace(rules(heads=4, kv_heads=2), [53, 24])


def run(trace: Trace, methods: Any, protocol: str = "prefill:8", **options: Any) -> Results:
    return analyze(trace, methods, [16], protocol=protocol, keep_exact=False, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Short",
            r"block_scores\(\) gave shape \(2, 1\) at .*; expected \(group, units\) = \(2, 6\)",
        ),
        ("Nan", r"block_scores\(\) gave NaN at layer 0, head 0, sequence 0, position 16"),
        ("Nothing", r"Nothing must define block_scores\(\), as every BlockMethod does"),
        ("Later", r"choose\(\) gave unit 6 of 4 keys at .*, and there are 6 up to the block's end"),
        ("Twice", r"choose\(\) gave unit 0 twice at layer 0, head 0"),
        ("OddAlways", r"always\(\) gave shape \(1, 1\) at .*; expected \(group or 1, units\)"),
        ("Future", r"sees the future: its choice for the block of .* after position 23"),
        ("Counter", r"when asked twice"),
    ],
)
def test_mistakes_are_told(
    trace: Trace, write_methods: Callable[..., str], name: str, message: str
) -> None:
    with pytest.raises(RetraceError, match=message):
        run(trace, f"{write_methods(METHODS)}:{name}")


def test_what_it_says_it_looks_at_may_change_a_choice(
    trace: Trace, write_methods: Callable[..., str]
) -> None:
    """The prompt's end, and of what is read in chunks the chunk's alone."""
    spec = f"{write_methods(METHODS)}:End"
    words = {"prefill:8": "the prompt's last", "prefill:8:chunk=16": "the chunk's last"}
    for protocol, looks_at in words.items():
        results = run(trace, spec, protocol)
        assert [facts["looks_at"] for facts in results.run["methods"].values()] == [looks_at]
    own = run(trace, f"{write_methods(METHODS)}:Newest").run["methods"]
    assert [facts["looks_at"] for facts in own.values()] == ["its own block"]


@pytest.mark.parametrize(
    ("spec", "protocol", "message"),
    [
        (
            "quest",
            "prefill:8",
            r"quest answers query by query, .* blocks:of=quest pools its scores",
        ),
        ("flat", "prefill:8", r"flat answers query by query, .* choose one of level block"),
        ("block-oracle:block=8", "all", r"block-oracle:block=8 chooses keys for whole blocks"),
        ("block-oracle", "prefix:9", r"the protocol prefix:9 asks query by query"),
        ("block-oracle:block=8", "prefill:12", r"chooses blocks of 8 keys, .*: give a multiple"),
    ],
)
def test_a_method_of_another_level_is_refused(
    trace: Trace, spec: str, protocol: str, message: str
) -> None:
    with pytest.raises(RetraceError, match=message):
        run(trace, spec, protocol)


def test_all_are_those_of_the_protocol(trace: Trace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        names = set(run(trace, "all", "prefill:128").names())
    assert {"block-oracle", "xattention", "minference", "blocks"} <= names
    assert not names & {"quest", "exact", "window"}
    assert not [r for r in caplog.records if "library" not in r.getMessage()]


def test_some_queries_are_not_enough(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [40], queries=[range(20, 40)])
    with pytest.raises(RetraceError, match=r"the trace holds 20 of 40: capture all of them"):
        run(trace, "block-oracle:block=8")


def test_later_blocks_alone(trace: Trace) -> None:
    """`min_context` leaves out whole blocks, and changes no choice of the others."""
    later = run(trace, "block-oracle:block=4", min_context=16).sequences
    assert set(later["count"][later["metric"] == "recall"]) == {53 - 16, 24 - 16}
    with pytest.raises(RetraceError, match="expected a multiple of 8"):
        run(trace, "block-oracle:block=4", min_context=12)


def test_a_run_goes_on_and_merges(trace: Trace, tmp_path: Any) -> None:
    """What is kept of a run holds the metrics of blocks."""
    spec = "block-oracle:block=4"
    whole = run(trace, spec)
    run(trace, spec, out=tmp_path / "r")
    again = Results.load(tmp_path / "r")
    for results in (again, run(trace, [spec, "a-shape:block=4"], out=tmp_path / "r")):
        ours = results.metrics[results.metrics["method"] == spec]
        for metric in ("compute_ratio", "block_recall", "choice_ratio"):
            rows = [one[one["metric"] == metric]["mean"] for one in (ours, whole.metrics)]
            np.testing.assert_array_equal(*rows)
    from retrace.analyze import merge

    for part in (1, 2):
        run(trace, spec, out=tmp_path / "parts", part=(part, 2))
    merged = merge([tmp_path / "parts"]).metrics
    np.testing.assert_array_equal(merged["mean"], whole.metrics["mean"])


def test_the_example_of_the_page(trace: Trace, tmp_path: Any) -> None:
    page = (Path(__file__).parents[3] / "docs/prefill.md").read_text(encoding="utf-8")
    (tmp_path / "alike.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    found = run(trace, f"{tmp_path}/alike.py:Alike:block=4").metrics.set_index("metric")["mean"]
    assert (found["compute_ratio"] < 0.9).all() and (found["attention_fraction"] > 0.2).all()
    assert (found["choice_ratio"] < 0.2).all()


def test_what_a_run_takes_is_estimated(trace: Trace) -> None:
    found = estimate(trace, "minference:block=8,last=4,tried=9", [16], protocol="prefill:8")
    assert (found.tasks, found.scores) == (1, 4 * 53 * 53)
    assert found.seconds > 0


def test_pictures_and_pages_take_it(trace: Trace, tmp_path: Any) -> None:
    from retrace.analyze import report
    from retrace.analyze.outputs.markdown import markdown

    results = run(trace, ["block-oracle:block=4", "a-shape:block=4"])
    assert "Compute Ratio" in markdown(results) and "Block Recall" in markdown(results)
    assert results.numbers()["a-shape:block=4", 16] == "77"
    results.draw(tmp_path / "plots")
    results.save(tmp_path / "results")
    assert report([tmp_path / "results"], out=tmp_path / "page.html")
