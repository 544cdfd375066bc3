"""SeerAttention-R against its definition, one query and page at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from retrace.analyze import Past, analyze
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.units.unit import load_units
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
SIZE, LENGTH, CHANNELS = 5, 43, 8


def test_scores_are_products_of_mapped_pools(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2, key_dim=CHANNELS, scale=0.3), [LENGTH])
    unit = next(iter(load_units(trace.layer(0), 0, torch.device("cpu"))))
    rng = np.random.default_rng(0)
    query_map = rng.normal(size=(2 * CHANNELS, CHANNELS))
    key_map = rng.normal(size=(3 * CHANNELS, CHANNELS))
    learned = {"query": torch.tensor(query_map).float(), "key": torch.tensor(key_map).float()}
    method: Any = parse_spec(f"seerattention-r:page={SIZE}").method
    state = method.build(Past(unit, 0, LENGTH, learned))
    found = method.scores(state, unit.queries * 0.3, unit.positions)
    keys, queries = unit.keys.double().numpy(), unit.queries.double().numpy() * 0.3
    for position in (0, 3, 4, 5, 17, 42):
        asked = np.concatenate(queries[:, position]) @ query_map
        worth = []
        for page in range(position // SIZE + 1):
            of_page = keys[page * SIZE : min((page + 1) * SIZE, position + 1)]
            pool = np.concatenate([of_page.max(axis=0), of_page.min(axis=0), of_page.mean(axis=0)])
            worth.append(asked @ (pool @ key_map))
        worth[-1] = max(worth) + 1
        for head in range(2):
            ours = found[head, position, : len(worth)]
            np.testing.assert_allclose(ours, worth, rtol=1e-4, atol=1e-4)


def test_learns_what_means_do_not_show(make_trace: MakeTrace, rules: Any) -> None:
    """Attention goes to single large keys of pages whose means are nothing special."""
    layer, length = rules(heads=2, kv_heads=1, key_dim=CHANNELS, scale=0.5), 384
    rng = np.random.default_rng(1)

    def sequence() -> tuple[Any, Any, Any]:
        keys = rng.normal(size=(1, length, CHANNELS))
        for page in range(0, length, 8):
            if rng.random() < 0.3:
                keys[0, page + rng.integers(8), 0] += 9.0
                keys[0, page : page + 8, 0] -= 9.0 / 8
        queries = rng.normal(size=(2, length, CHANNELS))
        queries[..., 0] = 2.0
        return queries, keys, rng.normal(size=(1, length, CHANNELS))

    tensors = {(0, s): sequence() for s in range(3)}
    trace = make_trace(layer, [length] * 3, tensors=tensors, name="gates")
    methods = [f"seerattention-r:page=8{steps}" for steps in ("", ",steps=0")]
    rows = analyze(trace, methods, [32], calibration_sequences=[2], keep_exact=False).metrics
    mass = rows[rows["metric"] == "attention_fraction"].groupby("method")["mean"].mean()
    learnt, untrained = (mass[method] for method in methods)
    assert learnt > 2 * untrained
