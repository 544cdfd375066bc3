"""What every installed method must satisfy: a new one is covered as soon as it has a name.

What depends on the kind of a layer or on the protocol is the engine's, level by level: one method
of each level meets every kind and every protocol, all others a plain layer and a windowed one, each
under a protocol of its own. So every method has every property, and every level every kind.
"""

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from retrace.analyze import (
    AttendMethod,
    BlockMethod,
    EvictionMethod,
    Method,
    PolicyMethod,
    ScoreMethod,
    SearchMethod,
    analyze,
    method_class,
    method_names,
    parse_spec,
)
from retrace.analyze.methods.registry import parameter_fields
from retrace.analyze.replay.calibration import calibration
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import Calibration, States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import LayerRules, Rotation, Trace

MakeTrace = Callable[..., Trace]
ROTATION = Rotation((1.0, 0.3, 0.1))
"""Of six channels, so that some are not rotated."""
KINDS = {
    "grouped": {},
    "own kv heads": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1},
    "window": {"window": 21},
    "chunk": {"chunk": 16},
    "softcap": {"softcap": 8.0},
    "sinks": {"sinks": (0.5, -1.0, 2.0, 4.0)},
    "narrow values": {"value_dim": 3},
    "everything": {"window": 30, "softcap": 8.0, "sinks": (0.0, 1.0, 2.0, 3.0), "value_dim": 5},
}


SMALL = {
    "arkvale": "page=4",
    "clusterkv": "size=4",
    "dsa-indexer": "heads=2,channels=5,steps=3",
    "duo-attention": "sink=1,recent=3,positions=20",
    "hashattention": "hidden=8,steps=3",
    "hata": "bits=16,steps=3",
    "infllm": "block=4,representatives=2,local=9,keep=sink:2+recent:4",
    "infllm-v2": "block=2,kernel=3,stride=2,keep=none",
    "kascade": "anchors=1,keys=5,queries=8",
    "kivi": "size=4,residual=8",
    "lessismore": "select=0",
    "linear-completion": "features=4,sink=1,recent=3,steps=3",
    "magicpig": "bits=3,tables=12,window=5",
    "mean-page": "page=2",
    "moba": "page=2",
    "nsa": "block=2,kernel=3,stride=2,keep=none",
    "pariskv": "keep=sink:1+recent:2",
    "quest": "page=2,least_pages=1",
    "retopk": "held=6,alike=2,recent=3,refresh=5",
    "retrieval-attention": "sink=2,near=4,links=4,ef_construction=6,ef=8,step=4",
    "retroinfer": "size=3,sink=1,recent=4",
    "rocketkv": "window=5,kernel=3,prompt=0.5",
    "saap": "parts=6,hidden=8,steps=3,keep=sink:1+recent:3",
    "seerattention-r": "page=2,steps=3",
    "shadowkv": "chunk=2,rank=5,outliers=2,local=1",
    "squeezed": "clusters=0.3,observed=6",
    "tidaldecode": "select=0",
    "token-select": "similarity=0.3,keep=sink:1+recent:2",
    "think": "window=5,recent=4",
    "simlayerkv": "sink=1,recent=4,threshold=0.3",
    "sparse-attention-hub": "maskers=SinkMasker:sink_size=2+LocalMasker:window_size=3+OracleTopK",
    "vattention": "sink=2,recent=3,base=0.2",
}
"""Parameters of methods that keep or learn so much by default that nothing is left to find in the
few keys of these traces, or that take long."""
SPECS = [
    f"{name}:{SMALL[name]}" if name in SMALL else name
    for name in method_names()
    if name != "native"  # of traces of other models; tests/capture/test_natively_sparse.py tries it
    and not issubclass(method_class(name), BlockMethod)  # test_every_block_method.py tries those
]
LEVELS = (EvictionMethod, ScoreMethod, SearchMethod, AttendMethod, PolicyMethod)
"""A method is of the first that it is a kind of."""
THOROUGH = ("snapkv", "quest", "flat", "kivi", "duo-attention")
"""A method of each level, for every kind of layer and every protocol."""


def level_of(name: str) -> type[Method]:
    """The level that a method is of."""
    kind = type(parse_spec(name).method)
    return next(level for level in LEVELS if issubclass(kind, level))


def on(every: list[tuple[str, ...]], some: list[tuple[str, ...]]) -> list[Any]:
    """Each method with some cases, and the thorough ones with every case."""
    return [
        pytest.param(spec, *case, id="-".join((spec, *case)))
        for spec in SPECS
        for case in (every if spec.partition(":")[0] in THOROUGH else some)
    ]


def is_installed(spec: str) -> bool:
    """Whether what a method needs is there."""
    extra = type(parse_spec(spec).method).extra
    return extra is None or importlib.util.find_spec(extra) is not None


@pytest.fixture(params=SPECS)
def method(request: pytest.FixtureRequest) -> str:
    """Every installed method whose dependencies are there."""
    extra = type(parse_spec(request.param).method).extra
    if extra is not None:
        pytest.importorskip(extra, reason=f"{extra} is not installed")
    return str(request.param)


def layer_of(rules: Any, **changes: Any) -> LayerRules:
    """Rules of a layer whose position encoding can be undone."""
    layer: LayerRules = rules(**{"heads": 4, "kv_heads": 2, "rotation": ROTATION, **changes})
    return layer


def selections(
    name: str, unit: Unit, protocol: str, ks: list[int], learned: Calibration, first: int, last: int
) -> list[list[Selection]]:
    """What a method selects for the queries of a unit from row `first` up to `last`, one by one."""
    spec = parse_spec(name)
    states = States(spec.method, unit, Protocol.parse(protocol), learned)
    found = []
    for row in range(first, last):
        block = Block(unit, slice(row, row + 1))
        for served in states.serve(block):
            found.append(select(spec.method, served, served.block, ks))
    return found


def test_a_method_of_each_level_is_tried_thoroughly() -> None:
    assert [level_of(name) for name in THOROUGH] == list(LEVELS)
    assert {level_of(name) for name in SPECS} == set(LEVELS)


def attended(selection: Selection) -> list[list[list[int]]]:
    """The keys attended at every budget, by head, of a selection for one query."""
    heads = len(selection.ids)
    counts = selection.attended.expand(-1, heads, 1)[..., 0].tolist()
    return [
        [[j for j in selection.ids[h, 0, : count[h]].tolist() if j >= 0] for h in range(heads)]
        for count in counts
    ]


def learn(trace: Trace, name: str) -> Calibration:
    """What a method learns from the trace's last sequence."""
    last = trace.sequences[-1:]
    return calibration(trace, parse_spec(name), last, trace.layers, torch.device("cpu"), False)


@pytest.fixture
def two_futures(
    make_trace: MakeTrace,
    rules: Any,
    tensors: Any,
    shared_traces: dict[str, Trace],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, list[Trace]]:
    """By a position, two traces that differ after it alone, in all layers; written once for all
    methods."""
    layer = layer_of(rules)
    rng = np.random.default_rng(4)
    given = [tensors(layer, 64, rng) for _ in range(2)]
    learnt = tensors(layer, 40, rng)

    def trace(name: str, last: int) -> Trace:
        asked = f"future {name} of {last}"
        if asked not in shared_traces:
            future = np.random.default_rng(len(name))
            after = np.arange(64)[:, None] > last
            changed = {
                (i, 0): tuple(np.where(after, 5 * future.normal(size=t.shape), t) for t in tensor)
                for i, tensor in enumerate(given)
            }
            shared_traces[asked] = make_trace(
                [layer, layer],
                [64, 40],
                queries=[range(64), range(40)],
                tensors={**changed, (0, 1): learnt, (1, 1): learnt},
                name=str(tmp_path_factory.mktemp("futures") / name),
            )
        return shared_traces[asked]

    return {last: [trace(name, last) for name in ("one", "other")] for last in (25, 46)}


@pytest.mark.parametrize(
    ("method", "protocol"),
    on(
        [("all",), ("all:16",), ("prefix:20",), ("prefix:0.4",)],
        [("all:16",), ("prefix:20",)],
    ),
    indirect=["method"],
)
def test_another_future_changes_no_figure(
    two_futures: dict[int, list[Trace]], method: str, protocol: str
) -> None:
    """Figures of the queries up to a position, with two futures after it, in all layers."""
    for last, traces in two_futures.items():
        first = max(20, last - 8)  # those before are held by the next test
        frames = []
        for trace in traces:
            learned = learn(trace, method)
            # Figures of later queries may differ, so that single queries are compared.
            frames.append(
                [
                    selections(method, unit, protocol, [2, 5], learned, first, last + 1)
                    for index in trace.layers
                    for unit in load_units(trace.layer(index), 0, torch.device("cpu"))
                ]
            )
        assert any(any(attended(s)[-1]) for units in frames[0] for s in units[-1])
        for ours, theirs in zip(*frames, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                for a, b in zip(one, other, strict=True):
                    assert attended(a) == attended(b)
                    assert (a.output is None) == (b.output is None)
                    if a.output is not None and b.output is not None:
                        assert torch.equal(a.output, b.output)


@pytest.mark.parametrize("protocol", ["all:16", "prefix:20"])
def test_keys_that_come_later_change_no_selection(
    make_trace: MakeTrace, rules: Any, method: str, protocol: str
) -> None:
    """Selections of early queries, with and without the rest of the sequence."""
    layer = layer_of(rules)
    trace = make_trace([layer, layer], [64, 40])
    learned = learn(trace, method)
    whole = list(load_units(trace.layer(1), 0, torch.device("cpu")))[1]
    early = replace(
        whole,
        queries=whole.queries[:, :40],
        positions=whole.positions[:40],
        keys=whole.keys[:40],
        values=whole.values[:40],
    )
    found = [
        [
            attended(s)
            for query in selections(method, unit, protocol, [3], learned, 20, 40)
            for s in query
        ]
        for unit in (whole, early)
    ]
    assert found[0] == found[1]
    assert any(any(heads) for budgets in found[0] for heads in budgets)


@pytest.mark.parametrize(
    ("method", "name", "protocol"),
    on(
        list(
            itertools.product(
                ("one kv head", "window", "chunk", "everything"), ("all:16", "prefix:20")
            )
        ),
        [("one kv head", "all:16"), ("window", "prefix:20")],
    ),
    indirect=["method"],
)
def test_keys_are_visible_ones_and_come_once(
    make_trace: MakeTrace, rules: Any, method: str, name: str, protocol: str
) -> None:
    kind = layer_of(rules, **KINDS[name])
    trace = make_trace([kind, kind], [64, 40])
    learned = learn(trace, method)
    for unit in load_units(trace.layer(1), 0, torch.device("cpu")):
        rows = selections(method, unit, protocol, [1, 4, 9], learned, 20, 64)
        for position, query in enumerate(rows, start=20):
            for selection in query:
                found = attended(selection)
                assert all(found[-1]), "some head attends nothing with the largest budget"
                for heads in found:
                    for ids in heads:
                        assert len(set(ids)) == len(ids)
                        assert all(kind.first_visible(position) <= j <= position for j in ids)
                if selection.output is not None:
                    assert selection.output.isfinite().all()


BUDGETS = [1, 3, 8, 64]
AT_LEAST = ("grouped", "all:16")
"""A kind of layer and a protocol that every method meets."""


def figures_of(trace: Trace, methods: list[str], protocol: str) -> pd.DataFrame:
    """All figures of the sequences that are not for calibration."""
    return analyze(
        trace,
        methods,
        BUDGETS,
        protocol=protocol,
        min_context=20,
        calibration_sequences=[2],
        keep_exact=False,
    ).metrics


@pytest.fixture(scope="session")
def alone() -> dict[str, pd.DataFrame]:
    """Figures of each method that was replayed by itself, once for two tests."""
    return {}


@pytest.mark.parametrize(
    ("method", "name", "protocol"),
    on(
        [
            *((name, "all:16") for name in KINDS),
            ("grouped", "prefix:20"),
            ("everything", "prefix:20"),
        ],
        [AT_LEAST, ("window", "prefix:20")],
    ),
    indirect=["method"],
)
def test_figures_on_every_kind_of_layer(
    make_trace: MakeTrace,
    rules: Any,
    alone: dict[str, pd.DataFrame],
    method: str,
    name: str,
    protocol: str,
) -> None:
    """Layers of 4 heads in 2 groups, changed in one thing."""
    kind = layer_of(rules, **KINDS[name])
    trace = make_trace([kind, kind], [64, 40, 30])
    rows = figures_of(trace, [method], protocol)
    if (name, protocol) == AT_LEAST:
        alone[method] = rows
    assert set(rows["head"]) == set(range(kind.heads))
    found = rows.pivot_table(index=["layer", "head", "topk"], columns="metric", values="mean")
    assert not found[["recall", "error_norm", "attention_fraction", "density"]].isna().any().any()
    assert (found["recall"] <= 1 + 1e-6).all() and (found["density"] <= 1 + 1e-6).all()
    assert (found["bytes_ratio"] > 0).all() and (found["error_norm"] >= 0).all()
    own: Method = parse_spec(method).method
    at = {k: found.xs(k, level="topk") for k in BUDGETS}
    # A larger budget may count a smaller share of a larger set, but never holds less mass.
    if isinstance(own, ScoreMethod):
        for less, more in itertools.pairwise(BUDGETS):
            lost = at[less]["attention_fraction"] - at[more]["attention_fraction"]
            assert lost.max() < 1e-5
    assert (at[64]["attention_fraction"] > at[1]["attention_fraction"] - 1e-5).all()
    if own.complete:
        np.testing.assert_allclose(at[64]["recall"], 1)
        if kind.sinks is None:
            np.testing.assert_allclose(at[64]["attention_fraction"], 1, atol=1e-5)
        np.testing.assert_allclose(at[64]["error_norm"], 0, atol=2e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_and_single_queries_agree(
    make_trace: MakeTrace, rules: Any, method: str, device: str
) -> None:
    """The answer to a query does not depend on which others it is answered with."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    trace = make_trace([layer_of(rules), layer_of(rules)], [64, 40], seed=3)
    protocol = Protocol.parse("prefix:20")
    spec, learned = parse_spec(method), learn(trace, method)
    target = torch.device(device)
    moved = {at: {n: t.to(target) for n, t in own.items()} for at, own in learned.items()}
    for unit in load_units(trace.layer(1), 0, target):
        alone = [s for (s,) in selections(method, unit, "prefix:20", [4], moved, 20, 64)]
        together = [
            select(spec.method, served, served.block, [4])[0]
            for served in States(spec.method, unit, protocol, moved).serve(
                Block(unit, slice(20, 64))
            )
        ]
        differing = 0
        rows = (
            whole.rows(slice(row, row + 1))
            for whole in together
            for row in range(whole.ids.shape[1])
        )
        for one, row in zip(alone, rows, strict=True):
            ids, others = (
                [set(head) for head in attended(selection)[0]] for selection in (one, row)
            )
            differing += ids != others
            if ids == others and one.output is not None:
                torch.testing.assert_close(one.output, row.output, rtol=1e-4, atol=1e-4)
        # Products of other shapes may round another way and turn a tie, and no more.
        assert differing <= (1 if device == "cpu" else len(alone) // 10)


def test_spec_round_trip(method: str) -> None:
    spec = parse_spec(method)
    listed = ",".join(
        f"{name}={value}" for name, value in spec.parameters.items() if value is not None
    )
    again = parse_spec(f"{spec.name}:{listed}")
    assert again.method == spec.method
    assert str(again) == str(spec) == str(parse_spec(str(spec)))


def test_every_method_says_what_it_is(method: str) -> None:
    own = type(parse_spec(method).method)
    assert own.__doc__ and own.source
    assert all(field.metadata.get("help") for field in parameter_fields(own))
    # Of what is not installed by itself, some extra of this package or a command says how.
    extras = importlib.metadata.metadata("retrace-attention").get_all("Provides-Extra") or []
    assert own.extra is None or own.install or own.extra in extras


OVERRIDES = {
    "budget=top-p:0.2": "density",
    "budget=fraction:0.1": "density",
    "budget=threshold:0.25": "density",
    "pool=sum-softmax": "attention_fraction",
    "pool=layer-sum": "attention_fraction",
    "keep=sink:2+recent:3": "attention_fraction",
    "output=mean-fill": "error_norm",
    "output=true-denominator": "error_norm",
}
"""What every score method shares, and a figure that follows from it."""
GROUP, LAYER = {"pool=sum-softmax"}, {"pool=sum-softmax", "pool=layer-sum"}
IDLE = {
    **dict.fromkeys(("expected-attention", "keydiff", "knorm"), GROUP),
    **dict.fromkeys(("infllm-v2", "nsa", "pyramidkv", "q-filters"), GROUP),
    **dict.fromkeys(("r-kv", "random-eviction", "seerattention-r", "snapkv"), GROUP),
    **dict.fromkeys(("dsa-indexer", "tova", "window"), LAYER),
    "retopk": {"output=mean-fill"},
}
"""What changes nothing of methods that score keys alike for all heads of a group or a layer, or
that estimate nothing of keys which they do not rank."""


@pytest.mark.parametrize(
    "method", [spec for spec in SPECS if issubclass(level_of(spec), ScoreMethod)], indirect=True
)
def test_shared_parts_can_be_overridden(
    make_trace: MakeTrace, rules: Any, untried: None, method: str
) -> None:
    trace = make_trace([layer_of(rules), layer_of(rules)], [64, 40, 30])
    plain = parse_spec(method)
    overridden = {
        override: parse_spec(f"{method}{',' if ':' in method else ':'}{override}")
        for override in OVERRIDES
        if override.partition("=")[0] + "=" not in method
    }
    # What the method is by default is no change.
    overridden = {o: spec for o, spec in overridden.items() if spec.method != plain.method}
    rows = analyze(
        trace,
        [str(plain), *(str(spec) for spec in overridden.values())],
        [6],
        min_context=20,
        calibration_sequences=[2],
        keep_exact=False,
    ).metrics
    by = rows.pivot_table(index=["method", "layer", "head"], columns="metric", values="mean")
    assert not by[["recall", "error_norm", "density"]].isna().any().any()
    ours, idle = by.loc[str(plain)], set()
    for override, spec in overridden.items():
        theirs, metric = by.loc[str(spec)], OVERRIDES[override]
        if np.allclose(ours[metric], theirs[metric]):
            idle.add(override)
        if metric == "error_norm":
            pd.testing.assert_series_equal(ours["recall"], theirs["recall"])
    assert idle == IDLE.get(plain.name, set())


@pytest.fixture(scope="session")
def beside() -> dict[str, pd.DataFrame]:
    """Figures of all methods, replayed together once."""
    return {}


def test_results_do_not_depend_on_companions(
    make_trace: MakeTrace,
    rules: Any,
    untried: None,
    alone: dict[str, pd.DataFrame],
    beside: dict[str, pd.DataFrame],
    method: str,
) -> None:
    kind, protocol = AT_LEAST
    layer = layer_of(rules, **KINDS[kind])
    trace = make_trace([layer, layer], [64, 40, 30])
    if method not in alone:
        alone[method] = figures_of(trace, [method], protocol)
    if not beside:
        rows = figures_of(trace, ["exact:keep=sink:1", *filter(is_installed, SPECS)], protocol)
        beside.update(dict(list(rows.groupby("method", observed=True))))
    theirs = beside[str(parse_spec(method))].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone[method], theirs)
