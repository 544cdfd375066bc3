"""Methods of every level on caches in few bits: found by what the bits give back, and compared with
exact attention over the originals."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from retrace.analyze import analyze
from retrace.analyze.methods.options.cache import Cache
from retrace.analyze.methods.specs import parse_spec, parse_specs
from retrace.analyze.selection.causality import check_causality
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, HeadGroup, Unit, load_units
from retrace.traces import LayerRules, RetraceError, Rotation, Trace

LEVELS = {
    "exact": "all",
    "quest:page=4,keep=sink:2+recent:3": "all",
    "sparq:output=mean-fill": "all",
    "exact:output=true-denominator": "all",
    "exact:pool=layer-sum-softmax": "all",
    "clusterkv:size=4": "all:16",
    "snapkv:window=5,keep=recent:5": "all:16",
    "h2o": "prefix:40",
    "flat:step=4": "all:16",
    "dense": "all",
    "oracle-sample": "all",
    "magicpig:bits=3,tables=12,window=5": "all:16",
    "block-oracle:block=8": "prefill:8",
    "quest:page=4": "prefix:35",
}
"""A spec of every level and kind of output, and the protocol it is asked under."""
K = 6
LENGTH = 75


def layer(**changes: Any) -> LayerRules:
    sizes = {"module": "layer", "heads": 4, "kv_heads": 2, "key_dim": 32, "value_dim": 64}
    return LayerRules(**{**sizes, "scale": 0.2, **changes})


def units_of(trace: Trace) -> list[Unit]:
    return list(load_units(trace.layer(0), 0, torch.device("cpu")))


def answers(spec: str, unit: Unit, protocol: str, ks: Sequence[int] = (K,)) -> list[Selection]:
    """What is selected for all queries that one state answers, state after state."""
    method, rule = parse_spec(spec).method, Protocol.parse(protocol)
    states, found = States(method, unit, rule), []
    first = rule.first_query(len(unit.keys))
    for block in unit.blocks(first, together=rule.block or 1):
        block = block.part(slice(block.row_of(first), len(block.positions)))
        for served in states.serve(block):
            found += select(method, served, served.block, ks)
    return found


def with_cache(spec: str, cache: str) -> str:
    return f"{spec}{',' if ':' in spec else ':'}cache={cache}"


def given_back(unit: Unit, cache: Cache) -> Unit:
    """A unit whose own keys and values are the rounded ones, and its neighbours' too."""
    return replace(
        unit,
        keys=cache.keys.rounded(unit.keys),
        values=cache.values.rounded(unit.values),
        neighbours=unit.neighbours and unit.neighbours.changed(lambda u: given_back(u, cache)),
    )


@pytest.mark.parametrize("cache", ["k:int4:32+v:fp8", "turboquant:2"])
@pytest.mark.parametrize(
    "kind", [{}, {"window": 30, "softcap": 8.0}, {"sinks": (0.5, -1.0, 2.0, 4.0)}]
)
@pytest.mark.parametrize("spec", LEVELS)
def test_a_method_meets_what_the_bits_give_back(
    spec: str, kind: dict[str, Any], cache: str, make_trace: Callable[..., Trace]
) -> None:
    """The same keys as in a sequence that has the rounded ones itself, and its output."""
    if spec.startswith("flat"):
        pytest.importorskip("faiss", reason="faiss is not installed")
    unit, protocol = units_of(make_trace(layer(**kind), [LENGTH]))[1], LEVELS[spec]
    expected = answers(spec, given_back(unit, Cache.parse(cache)), protocol)
    found = answers(with_cache(spec, cache), unit, protocol)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.attended, theirs.attended)
        assert ours.output is not None
        if theirs.output is not None:
            assert torch.equal(ours.output, theirs.output)
        assert ours.estimates is None and not ours.true_denominator


CACHES = ["fp8", "nvfp4", "int4:channel", "kivi:2", "k:int4:channel+v:kivi:4", "turboquant-prod:3"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("spec", [spec for spec in LEVELS if not spec.startswith("block")])
def test_no_later_key_is_seen(spec: str, cache: str, make_trace: Callable[..., Trace]) -> None:
    if spec.startswith("flat"):
        pytest.importorskip("faiss", reason="faiss is not installed")
    try:
        method = parse_spec(with_cache(spec, cache)).method
    except RetraceError as refusal:
        assert "the newest tokens in full" in str(refusal)
        assert spec.startswith(("oracle-sample", "magicpig"))
        return
    protocol = Protocol.parse(LEVELS[spec])
    unit = units_of(make_trace(layer(), [160]))[0]
    check_causality(method, unit, protocol, [3, K], max(20, protocol.first_query(160)))


class Leaky:
    """fp8 with a scale of the whole sequence."""

    step = None
    slides = False

    def rounded(self, vectors: torch.Tensor) -> torch.Tensor:
        scale = vectors.abs().max() / 7
        return (vectors / scale).round() * scale

    def bytes(self, channels: int) -> float:
        return channels

    def check(self, channels: int) -> None:
        """Any."""

    def first_full(self, position: torch.Tensor) -> torch.Tensor:
        return position + 1


@pytest.mark.parametrize("spec", ["exact", "window", "dense"])
def test_a_scale_of_all_keys_is_caught(spec: str, make_trace: Callable[..., Trace]) -> None:
    method = replace(parse_spec(spec).method, cache=Cache(Leaky(), Leaky()))  # type: ignore[arg-type]
    unit = units_of(make_trace(layer(), [90]))[0]
    with pytest.raises(RetraceError, match="sees the future"):
        check_causality(method, unit, Protocol(), [K], 20)


def test_groups_are_built_anew_as_they_are_rounded() -> None:
    """A state that is not fitted sees a group's keys in full first and rounded from then on."""
    keys = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    unit = Unit(
        HeadGroup(0, 0, 0, layer(heads=1, kv_heads=1)),
        torch.ones(1, 100, 32),
        torch.arange(100),
        keys,
        torch.ones(100, 64),
        None,
    )
    few = Cache.parse("int4:channel").keys.rounded(keys)
    method = parse_spec("exact:cache=k:int4:channel+v:fp8").method
    served = [*States(method, unit, Protocol()).serve(Block(unit, slice(20, 100)))]
    assert [s.rows for s in served] == [slice(0, 12), slice(12, 44), slice(44, 76), slice(76, 80)]
    for first, one in zip((0, 32, 64, 96), served, strict=True):
        assert torch.equal(one.state.keys[:first], few[:first])
        assert torch.equal(one.state.keys[first:], keys[first:])


def test_a_group_that_is_fitted_stays_as_it_was() -> None:
    unit = Unit(
        HeadGroup(0, 0, 0, layer(heads=1, kv_heads=1)),
        torch.ones(1, 120, 32),
        torch.arange(120),
        torch.randn(120, 32, generator=torch.Generator().manual_seed(0)),
        torch.ones(120, 64),
        None,
    )
    method = parse_spec("h2o:cache=int4:channel").method
    states = States(method, unit, Protocol(prefix=50))
    states_of = [s.state for s in states.serve(Block(unit, slice(50, 120)))]
    assert len(states_of) == 3 and all(state is states_of[0] for state in states_of)
    assert states.cost.builds == 1


def test_what_a_cache_gives_back_must_not_be_written_into(
    make_trace: Callable[..., Trace], write_methods: Callable[..., str], tmp_path: Any
) -> None:
    mine = write_methods(
        """
        @dataclass(frozen=True, kw_only=True)
        class Writes(ScoreMethod):
            holds_keys = True

            def scores(self, state, queries, positions):
                state.keys[0] += 1
                return queries @ state.keys.T
        """
    )
    trace = make_trace(layer(), [90])
    with pytest.raises(RetraceError, match="wrote into the keys of layer 0"):
        analyze(trace, methods=f"{mine}:Writes:cache=fp8", topk=[2], out=tmp_path / "r")


@pytest.mark.parametrize(
    ("rules", "spec", "message"),
    [
        ({"key_dim": 24}, "quest:cache=int4:32", "holds channels by 32, and there are 24 of them."),
        ({"value_dim": 8}, "dense:cache=nvfp4", "holds channels by 16, and there are 8 of them."),
        (
            {"kv_heads": 4, "cached_bytes": 100},
            "exact:cache=fp8",
            "caches one vector of a token for all heads",
        ),
    ],
)
def test_layers_that_a_cache_cannot_hold(
    rules: dict[str, Any],
    spec: str,
    message: str,
    make_trace: Callable[..., Trace],
    tmp_path: Any,
) -> None:
    trace = make_trace(layer(**rules), [60])
    with pytest.raises(RetraceError) as caught:
        analyze(trace, methods=spec, topk=[2], out=tmp_path / "r")
    assert message in str(caught.value) and spec in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_spec_for_each_cache() -> None:
    specs, _ = parse_specs("quest:cache={fp8,int4:32,k:kivi:2+v:int4:token},page=8")
    assert [str(spec) for spec in specs] == [
        f"quest:cache={cache},page=8" for cache in ("fp8", "int4:32", "k:kivi:2+v:int4:token")
    ]


@pytest.mark.parametrize(
    ("spec", "keys", "values"),
    [
        ("exact", True, True),
        ("quest:page=4", True, True),
        ("snapkv:window=5", True, True),
        ("dense", True, True),
        ("think:window=8", False, True),  # it keeps keys of its own
        ("shadowkv:chunk=2,rank=5,outliers=2,local=1", False, True),
        ("kivi:size=8,residual=8", False, False),  # and these values too
    ],
)
def test_only_what_the_cache_holds_is_cheaper(
    spec: str,
    keys: bool,
    values: bool,
    make_trace: Callable[..., Trace],
    tmp_path: Any,
    untried: None,
) -> None:
    """With everything attended, bytes fall by what the keys and values that are read save."""
    held = with_cache(spec, "k:int4:32+v:fp8")
    trace = make_trace(layer(value_dim=32, rotation=Rotation((1.0, 0.3, 0.1))), [88])
    options = {"min_context": 40, "protocol": "prefix:40"}
    found = analyze(trace, [spec, held], [88], out=tmp_path / "r", **options).metrics
    ratio = found[found.metric == "bytes_ratio"].groupby("method")["mean"].mean()
    saved = ratio[str(parse_spec(spec))] - ratio[str(parse_spec(held))]
    expected = (keys * (64 - 32 * 4.5 / 8) + values * (64 - 32)) / 128
    assert saved == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_layers_that_attend_everything(make_trace: Callable[..., Trace], tmp_path: Any) -> None:
    """As some methods do in their first ones: the cache alone, and all of it is read."""
    specs = ["lessismore:cache=int4:32", "dense:cache=int4:32"]
    found = analyze(make_trace([layer()] * 2, [90]), specs, [4], out=tmp_path / "r").metrics
    found = found[(found.layer == 0) & found.metric.isin(["error_norm", "bytes_ratio"])]
    sparse, dense = (found[found.method == spec]["mean"].to_numpy() for spec in specs)
    assert sparse == pytest.approx(dense, rel=1e-4)


def test_a_function_on_a_cache(
    make_trace: Callable[..., Trace], write_methods: Callable[..., str], tmp_path: Any
) -> None:
    mine = write_methods(
        """
        def everything(query, key, value, attention_mask, head_mask):
            scores = query @ key.mT / query.shape[-1] ** 0.5 + attention_mask
            ids = torch.arange(key.shape[2]).expand(*query.shape[:3], -1)
            seen = attention_mask == 0
            return scores.softmax(-1) @ value, None, ids.masked_fill(~seen, -1)
        """
    )
    spec = f"{mine}:everything:cache=int4:32"
    assert parse_spec(parse_spec(spec).place).method.cache == Cache.parse("int4:32")
    found = analyze(
        make_trace(layer(), [90]), [spec, "dense:cache=int4:32"], [4], out=tmp_path / "r"
    ).metrics
    found = found[found.metric == "error_norm"].groupby("method")["mean"].mean()
    assert len(found) == 2 and 1e-3 < found.iloc[0] == pytest.approx(found.iloc[1], rel=1e-4)
    with pytest.raises(RetraceError, match="takes no parameters in a spec but cache"):
        parse_spec(f"{mine}:everything:page=4")
    with pytest.raises(RetraceError, match="other values for each query"):
        parse_spec(f"{mine}:everything:cache=kivi:2")


def test_kivi_as_a_cache_is_the_method(make_trace: Callable[..., Trace], tmp_path: Any) -> None:
    """But that scales and offsets are rounded to float16 too."""
    trace = make_trace(layer(), [300], seed=2)
    found = analyze(
        trace,
        methods=["kivi:bits=4", "dense:cache=kivi:4"],
        topk=[300],
        min_context=150,
        out=tmp_path / "r",
    ).metrics
    error, cached = (
        found[(found.metric == "error_norm") & (found.method == m)]["mean"].to_numpy()
        for m in ("kivi:bits=4", "dense:cache=kivi:4")
    )
    assert error == pytest.approx(cached, rel=0.02)
    assert error.min() > 1e-3


def test_workers_and_plain_sums_agree(make_trace: Callable[..., Trace], tmp_path: Any) -> None:
    trace = make_trace([layer()] * 2, [150, 90])
    asked = {"methods": ["quest:cache=int4:channel", "dense:cache=turboquant:3"], "topk": [4, 9]}
    tables = [analyze(trace, **asked, out=tmp_path / str(n), workers=n).metrics for n in (1, 2)]
    assert tables[0].equals(tables[1])
