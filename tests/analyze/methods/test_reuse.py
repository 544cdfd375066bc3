"""Methods that answer a query by those before it, against a walk through sequences in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from retrace.analyze import analyze, parse_spec
from retrace.traces import LayerRules, RetraceError, Rotation, Trace

Array = npt.NDArray[np.float64]
MakeTrace = Callable[..., Trace]
FREQUENCIES = (1.0, 0.3)
K = 6
KINDS: list[dict[str, Any]] = [{}, {"window": 20, "softcap": 8.0}, {"chunk": 16}]
LENGTHS = (53, 1, 24)
Place = tuple[int, int, int]


def place(query: Any) -> Place:
    """Which query of the trace it is."""
    return len(query.keys), query.head, query.position


def turned_back(vector: Array, position: int) -> Array:
    """Channels 0 and 2 and channels 1 and 3 as they were before they turned by their position."""
    found = vector.copy()
    for pair, frequency in enumerate(FREQUENCIES):
        turn = np.exp(-1j * position * frequency)
        number = (vector[pair] + 1j * vector[pair + len(FREQUENCIES)]) * turn
        found[pair], found[pair + len(FREQUENCIES)] = number.real, number.imag
    return found


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def by_turn(queries: Any, layer_wide: bool) -> list[list[list[Any]]]:
    """The queries of each sequence in turn, of every set of heads that select together."""
    found: dict[tuple[int, int], dict[int, list[Any]]] = {}
    for group in queries:
        own = 0 if layer_wide else group[0].head
        of_set = found.setdefault((len(group[0].keys), own), {})
        of_set.setdefault(group[0].position, []).extend(group)
    return [[turns[p] for p in sorted(turns)] for turns in found.values()]


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(initial=0))
    return weights / weights.sum()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("pool", ["none", "layer-sum-softmax"])
def test_token_select(
    make_trace: MakeTrace,
    rules: Callable[..., LayerRules],
    expected: Any,
    assert_figures: Any,
    queries_of: Any,
    pool: str,
    kind: dict[str, Any],
) -> None:
    layer = rules(heads=4, rotation=Rotation(FREQUENCIES), **kind)
    trace = make_trace(layer, LENGTHS)
    sink, recent, similarity = 1, 2, 0.3
    chosen: dict[Place, list[int]] = {}
    anew = dict[Place, bool]()
    for turns in by_turn(queries_of(trace), pool != "none"):
        last: Any = None
        for heads in turns:
            together = np.concatenate([turned_back(q.query, q.position) for q in heads])
            position, visible = heads[0].position, heads[0].visible
            if len(visible) <= K:
                last = None
            again = (
                last is not None
                and last[0] >= visible[0]
                and cosine(last[1], together) >= similarity
            )
            if not again:
                ends = position - recent
                among = [j for j in visible if sink <= j <= ends]
                at = len(visible) > K
                last = (position, together, heads, among) if at else None
            _, _, asked, among = last or (position, together, heads, among)
            if pool == "none":
                worth = [dict(zip(among, q.scores[among], strict=True)) for q in asked]
            else:
                shares = np.sum([softmax(q.scores[among]) for q in asked], axis=0)
                worth = [dict(zip(among, shares, strict=True))] * len(heads)
            kept = [j for j in visible if j < sink or j > position - recent]
            first = [j for j in visible if j < sink]
            newest = [j for j in visible[::-1] if j > position - recent and j >= sink]
            for query, own in zip(heads, worth, strict=True):
                seen = [j for j in own if j >= visible[0]]
                found = sorted(seen, key=lambda j, own=own: (-own[j], j))[: K - len(kept)]
                chosen[place(query)] = [*first, *newest, *found]
                anew[place(query)] = not again
    assert 0.1 < np.mean(list(anew.values())) < 0.9

    def aux(query: Any) -> float:
        read = 16 * len(query.visible) if anew[place(query)] else 0
        return float(read + 2 * 16)  # the group's two queries that selected last

    spec = f"token-select:similarity={similarity},pool={pool},keep=sink:{sink}+recent:{recent}"
    results = analyze(trace, [spec], [K], min_context=0, keep_exact=False)
    figures = expected(trace, lambda query, k: chosen[place(query)], K, first=0, aux=aux)
    assert_figures(results, str(results.methods()[0]), K, figures)


def test_pages_are_selected_again_and_grow(make_trace: MakeTrace, rules: Any) -> None:
    """Quest's newest page is the same page when later keys have joined it."""
    trace = make_trace(rules(heads=4, rotation=Rotation(FREQUENCIES)))
    always = "token-select:of=quest:page=4+least_pages=1,similarity=-1,keep=none,pool=none"
    never = always.replace("=-1", "=2")
    plain = "quest:page=4,least_pages=1,keep=recent:1"
    results = analyze(trace, [always, never, plain], [8], min_context=0, keep_exact=False)
    table = results.metrics.pivot_table(index="method", columns="metric", values="mean")
    again, anew, quest = (table.loc[name] for name in results.methods())
    for metric in ("recall", "error_norm", "density"):
        assert anew[metric] == pytest.approx(quest[metric])
    assert again["recall"] < anew["recall"]
    assert again["bytes_ratio"] < anew["bytes_ratio"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_retopk(
    make_trace: MakeTrace,
    rules: Callable[..., LayerRules],
    expected: Any,
    assert_figures: Any,
    queries_of: Any,
    kind: dict[str, Any],
) -> None:
    trace = make_trace(rules(heads=4, **kind), LENGTHS)
    held, alike, recent, refresh, similarity = 7, 2, 3, 6, 0.4
    chosen: dict[Place, list[int]] = {}
    ranked: dict[Place, set[int]] = {}
    compared: dict[Place, int] = {}
    whole = []
    for turns in by_turn(queries_of(trace), False):
        for h in range(2):
            known: list[tuple[Array, list[int]]] = []
            since = refresh
            for heads in turns:
                query = heads[h]
                visible = [int(j) for j in query.visible]
                compared[place(query)] = 0
                if len(visible) <= K:
                    known, since = [], refresh
                    chosen[place(query)], ranked[place(query)] = query.best(query.scores, K), set()
                    continue
                near = [cosine(q, query.query) for q, _ in known]
                compared[place(query)] = len(known)
                if since >= refresh or max(near) < similarity:
                    among, since = set(visible), 0
                else:
                    order = sorted(range(len(near)), key=lambda e, near=near: (-near[e], -e))
                    among = {*visible[-recent:]}.union(*(known[e][1] for e in order[:alike]))
                    among &= set(visible)
                since += 1
                whole.append(len(among) == len(visible))
                ids = sorted(among, key=lambda j, q=query: (-q.scores[j], j))[:K]
                known = [*known, (query.query, ids)][-held:]
                chosen[place(query)], ranked[place(query)] = ids, among
    assert 0.1 < np.mean(whole) < 0.9
    groups = {place(query): group for group in queries_of(trace) for query in group}

    def aux(query: Any) -> float:
        group = groups[place(query)]
        read = set().union(*(ranked[place(q)] for q in group))
        return 16.0 * (len(read) + sum(compared[place(q)] for q in group))

    spec = (
        f"retopk:held={held},alike={alike},recent={recent},refresh={refresh},"
        f"similarity={similarity}"
    )
    results = analyze(trace, [spec], [K], min_context=0, keep_exact=False)
    figures = expected(trace, lambda query, k: chosen[place(query)], K, first=0, aux=aux)
    assert_figures(results, str(results.methods()[0]), K, figures)


def test_ranking_all_again_each_time_is_exact(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4))
    results = analyze(trace, ["exact", "retopk:refresh=1"], [4, 9], min_context=0)
    rows = results.metrics.query("topk in (4, 9)")
    table = rows.pivot_table(index=["metric", "head", "topk"], columns="method", values="mean")
    table = table.loc[["recall", "error_norm", "attention_fraction", "density"]]
    assert table["retopk:refresh=1"].to_numpy() == pytest.approx(table["exact"].to_numpy())


@pytest.mark.parametrize("method", ["token-select", "retopk"])
def test_what_cannot_be_followed_is_refused(make_trace: MakeTrace, rules: Any, method: str) -> None:
    layer = rules(heads=4, rotation=Rotation(FREQUENCIES))
    some = make_trace(layer, [40], queries=[[*range(20, 30), *range(32, 40)]], name="some")
    with pytest.raises(RetraceError, match="trace has that of position 29 and next that of 32"):
        analyze(some, [method], [2], keep_exact=False)
    with pytest.raises(RetraceError, match="cache=int4:32"):
        analyze(some, [f"{method}:cache=int4:32"], [2], keep_exact=False)
    shared = make_trace(
        rules(heads=4, kv_heads=4, rotation=Rotation(FREQUENCIES), cached_bytes=24),
        [40],
        name="mla",
    )
    with pytest.raises(RetraceError, match="share one cache"):
        analyze(shared, [method], [2], keep_exact=False)


def test_what_cannot_be_used_again_is_refused() -> None:
    for of, why in (
        ("clusterkv", "fitted to earlier keys"),
        ("tidaldecode", "looks at other layers"),
        ("hnsw", "scores no keys"),
    ):
        with pytest.raises(RetraceError, match=why):
            parse_spec(f"token-select:of={of}")
