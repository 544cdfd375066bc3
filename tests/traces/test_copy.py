"""A copy of a trace, or of a slice of it, is a trace like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import (
    PHASES,
    LayerRules,
    OutputProjection,
    RemoteLocation,
    RetraceError,
    Trace,
    copy_trace,
    create_trace,
    open_trace,
    verify_trace,
)
from retrace.traces.schema import DTYPES

LENGTHS = (70, 90, 33, 81)
RULES = {
    0: LayerRules("model.layers.0", 4, 2, 8, 6, 0.5, window=13),
    2: LayerRules("model.layers.2", 2, 2, 8, 8, 0.5, sinks=(0.5, -1.0), cached_bytes=24),
    5: LayerRules("model.layers.5", 2, 1, 8, 8, 0.5, softcap=4.0),
}
MARKS: list[dict[str, list[range]]] = [{}, {"answer": [range(80, 85)]}, {}, {"end": [range(3, 9)]}]


@pytest.fixture(params=[1, 2], ids=["shards of one", "shards of two"])
def trace(request: pytest.FixtureRequest, tmp_path: Path) -> Trace:
    """A trace with all that one can hold, of four sequences, the third of which is not finished
    where each has shards of its own."""
    return written(tmp_path / "t.zarr", bundle=request.param)


def written(path: Path, bundle: int = 1, dtype: str = "bfloat16") -> Trace:
    rng = np.random.default_rng(0)
    phases = [np.zeros(n, np.int8) for n in LENGTHS]
    for phase in phases:
        phase[-8:] = PHASES["continuation"]
    kept = [np.arange(n % 2, n, 2, dtype=np.int32) for n in LENGTHS]

    def weights() -> Any:
        return np.ones((16, 4, 6), np.float32).astype(DTYPES[dtype])

    writer = create_trace(
        path,
        rules=RULES,
        tokens=[rng.integers(0, 99, n).astype(np.int32) for n in LENGTHS],
        query_positions=kept,
        dtype=dtype,
        attributes={"model": {"pretrained": "random"}, "task": [], "capture": {"queries": "all"}},
        phases=phases,
        marks=MARKS,
        projections={
            0: OutputProjection("model.layers.0.o_proj", 16, weights),
            2: "it is gated",
        },
        diverges=True,
        bundle=bundle,
    )
    for some in writer._bundles:
        if bundle == 1 and some.start == 2:
            continue
        for index, rules in RULES.items():
            for name, heads, channels in (
                ("query", rules.heads, rules.key_dim),
                ("key", rules.kv_heads, rules.key_dim),
                ("value", rules.kv_heads, rules.value_dim),
            ):
                counts = [len(kept[s]) if name == "query" else LENGTHS[s] for s in some]
                parts = [rng.normal(size=(heads, n, channels)) for n in counts]
                writer.write_shard(some, index, name, 0, [p.astype(DTYPES[dtype]) for p in parts])
        figures = [rng.random(LENGTHS[s]).astype(np.float32) for s in some]
        writer.finish_bundle(some, figures, figures)
    writer.close()
    return open_trace(path)


def assert_copied(trace: Trace, copy: Trace, numbers: tuple[int, ...], kept: Any = None) -> None:
    """Compare all of a copy with what it is of."""
    assert verify_trace(copy).whole
    assert copy.sequences == tuple(range(len(numbers))) and copy.planned == len(numbers)
    for name, value in trace.attributes.items():
        if name not in ("retrace_format", "copied"):
            assert copy.attributes[name] == value
    for here, there in enumerate(numbers):
        positions = trace.query_positions(there)
        rows = np.arange(len(positions)) if kept is None else np.flatnonzero(kept(there))
        for read in ("tokens", "nll", "kl", "phase"):
            found, expected = getattr(copy, read)(here), getattr(trace, read)(there)
            np.testing.assert_array_equal(found, expected)
        assert copy.marks(here) == trace.marks(there)
        np.testing.assert_array_equal(copy.query_positions(here), positions[rows])
        for index in copy.layers:
            ours, theirs = copy.layer(index), trace.layer(index)
            assert ours.rules == theirs.rules and ours.attributes == theirs.attributes
            for read in ("key", "value"):
                found, expected = getattr(ours, read)(here), getattr(theirs, read)(there)
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(ours.query(here), theirs.query(there)[:, rows])
            weights = theirs.output_projection
            if weights is not None:
                np.testing.assert_array_equal(ours.output_projection, weights)


def test_all(trace: Trace, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    copy = copy_trace(trace, tmp_path / "all", progress=lambda *done: seen.append(done))
    assert copy.layers == (0, 2, 5) and copy.layer(0).has_output_projection
    assert copy.layer(2).attributes["no_output_projection"] == "it is gated"
    assert_copied(trace, copy, trace.sequences)
    count = len(trace.sequences) * 3
    assert seen[0] == (0, count) and seen[-1] == (count, count)
    (copied,) = copy.attributes["copied"]
    assert copied["trace"] == str(trace.path) and copied["sequences"] == list(trace.sequences)


def test_a_slice_of_a_slice(trace: Trace, tmp_path: Path) -> None:
    some = copy_trace(str(trace.path), tmp_path / "some", layers=[5, 2], sequences=[3, 1])
    assert some.layers == (2, 5) and some.mark_names == ("answer", "end")
    assert_copied(trace, some, (1, 3))
    one = copy_trace(some, tmp_path / "one", layers=[5], sequences=[1], queries="stride:4")
    assert_copied(some, one, (1,), lambda s: selected(some, s, 4))
    assert [copied["layers"] for copied in one.attributes["copied"]] == [[2, 5], [5]]


def selected(trace: Trace, sequence: int, stride: int) -> Any:
    """Which of the queries that are there a stride keeps, by its definition."""
    positions, length = trace.query_positions(sequence), trace.length(sequence)
    end = length - 8  # of the prompt
    observed = (positions >= end - 64) & (positions < end)
    return observed | ((length - 1 - positions) % stride == 0)


@pytest.mark.parametrize("url", ["memory://copies/t.zarr", "memory://copies/u.zarr"])
def test_object_stores(trace: Trace, tmp_path: Path, url: str) -> None:
    there = copy_trace(trace, url, sequences=[0, 1], overwrite=True)
    assert isinstance(there.path, RemoteLocation)
    assert_copied(trace, there, (0, 1))
    back = copy_trace(url, tmp_path / "back")
    assert_copied(trace, back, (0, 1))
    with pytest.raises(RetraceError, match="is the trace itself"):
        copy_trace(url, url, overwrite=True)
    with pytest.raises(RetraceError, match="exists"):
        copy_trace(trace, url)


def test_what_is_there_is_kept(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    good = copy_trace(trace, out, sequences=[0])
    digest = good.digest(0)
    with pytest.raises(RetraceError, match=r"exists.*--overwrite"):
        copy_trace(trace, out)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_trace(trace, out, overwrite=True, progress=stop)
    assert open_trace(out).digest(0) == digest
    copy = copy_trace(trace, out, resume=True)
    assert_copied(trace, copy, trace.sequences)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zarr", "t.zarr"]


def test_an_interrupted_copy_goes_on(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 100)  # shards of one
    out, calls = tmp_path / "out", 0

    def stop(done: int, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_trace(trace, out, progress=stop)
    begun = open_trace(out).sequences
    assert begun and begun != trace.sequences
    with pytest.raises(RetraceError, match="with other tokens"):
        copy_trace(trace, out, sequences=[1, 3], resume=True)
    with pytest.raises(RetraceError, match="with other queries"):
        copy_trace(trace, out, queries="last:1", resume=True)

    def count(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        assert done >= 3 * len(begun)

    assert_copied(trace, copy_trace(trace, out, resume=True, progress=count), trace.sequences)
    assert calls < 1 + 3 * len(trace.sequences)


def test_what_is_not_there(trace: Trace, tmp_path: Path) -> None:
    for asked, words in (
        ({"layers": [1]}, "has no layer 1"),
        ({"layers": []}, "No layer is to be copied"),
        ({"sequences": [0, 9]}, "has no finished sequence 9"),
        ({"sequences": []}, "no finished sequence"),
        ({"queries": "some"}, "queries must be"),
        ({"overwrite": True, "resume": True}, "contradict"),
    ):
        with pytest.raises(RetraceError, match=words):
            copy_trace(trace, tmp_path / "out", **asked)
        assert not (tmp_path / "out").exists()
    with pytest.raises(RetraceError, match="is the trace itself"):
        copy_trace(trace, trace.path, overwrite=True)


def test_damage_is_not_copied(tmp_path: Path) -> None:
    trace = written(tmp_path / "t.zarr")
    shard = trace.path / "layers/2/key/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RetraceError, match="key of layer 2, sequence 0 is damaged"):
        copy_trace(open_trace(trace.path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    copy = copy_trace(trace, tmp_path / "out", layers=[0, 5])
    assert verify_trace(copy).whole


@pytest.mark.parametrize("bundle", [1, 2])
def test_analyses_agree_to_the_last_bit(bundle: int, tmp_path: Path) -> None:
    trace = written(tmp_path / "t.zarr", bundle, dtype="float32")
    copy = copy_trace(trace, tmp_path / "copy", layers=[2, 5], sequences=[1, 3])
    methods, settings = ["exact", "quest:page=4", "window", "snapkv"], {"min_context": 9}
    whole = analyze(trace, methods, [4, 7], layers=[2, 5], keep_exact=False, **settings)
    ours = analyze(copy, methods, [4, 7], keep_exact=False, **settings)
    theirs = whole.sequences[whole.sequences["sequence"].isin([1, 3])]
    theirs = theirs.assign(sequence=theirs["sequence"].map({1: 0, 3: 1}))
    by = ["method", "layer", "head", "topk", "metric", "sequence"]
    ours, theirs = (
        rows.set_index(by).sort_index().astype({"mean": float}) for rows in (ours.sequences, theirs)
    )
    assert len(ours) and ours.equals(theirs[ours.columns].astype(ours.dtypes))


def test_a_trace_without_it_all(tmp_path: Path) -> None:
    """What an earlier release wrote has neither phases, marks nor output projections."""
    old = open_trace(Path(__file__).parents[1] / "data/format-1/bfloat16.zarr")
    copy = copy_trace(old, tmp_path / "new")
    assert verify_trace(copy).whole and not copy.has("marks") and not copy.has("kl")
    assert copy.layer(1).output_projection is None
    assert copy.layer(1).rules == old.layer(1).rules
    np.testing.assert_array_equal(copy.layer(1).key(1), old.layer(1).key(1))


def test_command(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from click.testing import CliRunner

    from retrace.cli.main import main

    runner: Callable[..., Any] = CliRunner().invoke
    arguments = ["copy", str(trace.path), str(tmp_path / "c"), "--layers", "0,5", "--sequences"]
    result = runner(main, [*arguments, "0-1", "--queries", "last:1"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(tmp_path / "c")]
    assert "2 sequences, 2 layers" in result.stderr
    assert open_trace(tmp_path / "c").layers == (0, 5)
    again = runner(main, [*arguments, "0-1"])
    assert again.exit_code == 2 and "--overwrite" in again.output
    assert f"Copied from  {trace.path}" in runner(main, ["info", str(tmp_path / "c")]).stdout
