"""Maskers of sparse-attention-hub replayed: as the framework attends itself, and as our own do."""

import importlib
import importlib.util
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrace.analyze import Past, analyze, parse_spec
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import RetraceError, Trace

INSTALL = (
    "pip install ray seaborn && "
    "pip install --no-deps git+https://github.com/xAlg-ai/sparse-attention-hub"
)
if importlib.util.find_spec("sparse_attention_hub") is None:
    pytest.skip(f"sparse-attention-hub is not installed: {INSTALL}", allow_module_level=True)

MakeTrace = Callable[..., Trace]
POSITIONS = (40, 77, 99)
SHAPES = ((4, 16), (2, 16), (2, 8))


def of(maskers: str) -> str:
    return f"sparse-attention-hub:maskers={maskers}"


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Of normal numbers, so that no two keys tie."""
    layer = rules(heads=4, kv_heads=2, key_dim=16, value_dim=8)
    draws = np.random.default_rng(1)
    tensors = tuple(draws.normal(size=(heads, 100, dim)) for heads, dim in SHAPES)
    return make_trace(layer, [100], tensors={(0, 0): tensors})


@pytest.fixture
def hashes(tmp_path: Path) -> str:
    """A file of HashAttention weights for the four heads of layer 0."""
    draws = torch.Generator().manual_seed(0)
    weights = {
        f"{side}_{kind}": [
            torch.randn(4, *shape, generator=draws)
            for shape in (((16, 12), (12, 32)) if kind == "matrix" else ((12,), (32,)))
        ]
        for side in ("query", "key")
        for kind in ("matrix", "bias")
    }
    path = tmp_path / "hat.pkl"
    path.write_bytes(pickle.dumps({0: weights}))
    return (
        f"HashAttentionTopKMasker:hat_bits=32:hat_mlp_layers=2:hat_mlp_hidden_size=12"
        f":hat_mlp_activation=silu:hat_weight_file={path}"
    )


def channels(tmp_path: Path, order: list[list[int]]) -> str:
    """A file of Double Sparsity's channels for each head of layer 0."""
    path = tmp_path / "channels.json"
    path.write_text(json.dumps({"model.layers.0.self_attn.qk_proj": order}))
    return f"DoubleSparsityTopKMasker:group_factor=4:label_bits=4:sorted_channel_file={path}"


def replayed(spec: str, unit: Unit, k: int) -> tuple[Tensor, list[list[set[int]]]]:
    """Outputs (group, positions, value channels) and the keys attended, by head and position."""
    method: Any = parse_spec(spec).method
    positions = torch.tensor(POSITIONS)
    queries = unit.queries[:, positions] * unit.group.rules.scale
    state = method.build(Past(unit, 0, len(unit.keys)))
    output, ids = method.attend(state, queries, positions, k)
    return output, [[{j for j in row if j >= 0} for row in head] for head in ids.tolist()]


def by_the_framework(configs: list[Any], units: list[Unit], position: int) -> Tensor:
    """What its attention gives for the whole layer at one position (heads, value channels)."""
    hub: Any = importlib.import_module("sparse_attention_hub.sparse_attention")
    attention = hub.ResearchAttention.create_from_config(
        hub.ResearchAttentionConfig(masker_configs=configs)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output, _ = attention.custom_attention(
            module=SimpleNamespace(training=False),
            queries=torch.cat([unit.queries[:, position] for unit in units])[None, :, None],
            keys=torch.stack([unit.keys[: position + 1] for unit in units])[None],
            values=torch.stack([unit.values[: position + 1] for unit in units])[None],
            attention_mask=None,
            scaling=units[0].group.rules.scale,
            dropout=0.0,
            sparse_meta_data={},
            layer_idx=0,
        )
    found: Tensor = output[0, 0]
    return found


def test_outputs_are_the_frameworks(trace: Trace, hashes: str, tmp_path: Path) -> None:
    """Of all heads of a layer at once, by maskers that draw no random numbers of the moment."""
    order = [torch.randperm(16).tolist() for _ in range(4)]
    inside = importlib.import_module(
        "sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations"
    )
    hub = importlib.import_module(
        "sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.implementations"
    )
    hat = dict(part.split("=") for part in hashes.split(":")[1:])
    sparse = channels(tmp_path, order)
    cases = {
        "SinkMasker:sink_size=2+LocalMasker:window_size=5": [
            inside.SinkMaskerConfig(sink_size=2),
            inside.LocalMaskerConfig(window_size=5),
        ],
        "SinkMasker:sink_size=2+OracleTopK": [
            inside.SinkMaskerConfig(sink_size=2),
            inside.OracleTopKConfig(heavy_size=9),
        ],
        "OracleTopK:heavy_size=0.1": [inside.OracleTopKConfig(heavy_size=0.1)],
        "LocalMasker:window_size=3+OracleTopPMasker:top_p=0.7": [
            inside.LocalMaskerConfig(window_size=3),
            inside.OracleTopPMaskerConfig(top_p=0.7),
        ],
        "QuestTopKMasker:page_size=3": [inside.QuestTopKMaskerConfig(heavy_size=9, page_size=3)],
        f"SinkMasker:sink_size=2+{hashes}": [
            inside.SinkMaskerConfig(sink_size=2),
            inside.HashAttentionTopKMaskerConfig(
                heavy_size=9,
                hat_bits=32,
                hat_mlp_layers=2,
                hat_mlp_hidden_size=12,
                hat_mlp_activation="silu",
                hat_weight_file=hat["hat_weight_file"],
            ),
        ],
        sparse: [
            inside.DoubleSparsityTopKMaskerConfig(
                heavy_size=9,
                group_factor=4,
                label_bits=4,
                sorted_channel_file=sparse.rpartition("=")[2],
            )
        ],
        "LocalMasker:window_size=3+MagicPig:lsh_l=8:lsh_k=2:center=false": [
            inside.LocalMaskerConfig(window_size=3),
            hub.MagicPigConfig(lsh_l=8, lsh_k=2, center=False),
        ],
    }
    units = list(load_units(trace.layer(0), 0, torch.device("cpu")))
    # MagicPig scales by the largest norm of all heads; here both kv heads have the same keys.
    if_alike = [units[0], units[0]]
    for maskers, configs in cases.items():
        layer = if_alike if "MagicPig" in maskers else units
        ours = torch.cat([replayed(of(maskers), unit, 9)[0] for unit in units])
        for place, position in enumerate(POSITIONS):
            theirs = by_the_framework(configs, layer, position)
            heads = slice(0, 2 if "MagicPig" in maskers else 4)
            torch.testing.assert_close(ours[heads, place], theirs[heads], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("maskers", "own"),
    [
        ("OracleTopK", "exact"),
        ("OracleTopK:heavy_size=k", "exact"),
        ("QuestTopKMasker:page_size=3", "quest:page=3"),
    ],
)
def test_the_same_keys_as_our_own(trace: Trace, maskers: str, own: str) -> None:
    rows = analyze(trace, [of(maskers), own], [9, 30], min_context=12, keep_exact=False).metrics
    rows = rows[~rows["metric"].isin(["bytes_ratio"])]
    table = rows.pivot_table("mean", ["metric", "head", "topk"], "method")
    np.testing.assert_allclose(table.iloc[:, 0], table.iloc[:, 1], atol=1e-5)


def test_sinks_and_recent_keys_are_the_windows(trace: Trace) -> None:
    specs = [of("SinkMasker:sink_size=4+LocalMasker:window_size=8"), "window:keep=sink:4+recent:8"]
    rows = analyze(trace, specs, [12], min_context=30, keep_exact=False).metrics
    rows = rows[rows["metric"].isin(["attention_fraction", "error_norm", "density"])]
    table = rows.pivot_table("mean", ["metric", "head"], "method")
    np.testing.assert_allclose(table.iloc[:, 0], table.iloc[:, 1], atol=1e-5)


def test_double_sparsity_as_our_own(trace: Trace, tmp_path: Path) -> None:
    """With the channels that our own calibration ranks first."""
    own: Any = parse_spec("double-sparsity:gamma=4,bits=16").method
    units = list(load_units(trace.layer(0), 0, torch.device("cpu")))
    learnt = [own.calibrate([Past(unit, 0, 100)]) for unit in units]
    order = torch.cat([one["magnitude"] for one in learnt]).argsort(
        dim=-1, descending=True, stable=True
    )
    spec = of(channels(tmp_path, order.tolist()).replace("label_bits=4", "label_bits=16"))
    for unit, magnitude in zip(units, learnt, strict=True):
        state = own.build(Past(unit, 0, 100, magnitude))
        queries = unit.queries[:, list(POSITIONS)] * unit.group.rules.scale
        scores = own.scores(state, queries, torch.tensor(POSITIONS))
        for head, rows in enumerate(replayed(spec, unit, 9)[1]):
            for place, keys in enumerate(rows):
                best = scores[head, place, : POSITIONS[place] + 1].topk(9).indices
                assert keys == set(best.tolist())


def test_hash_attention_as_signs_of_a_network(trace: Trace, hashes: str) -> None:
    """The largest products of signs, in plain NumPy; those at the edge may be tied."""
    weights = pickle.loads(Path(hashes.rpartition("=")[2]).read_bytes())[0]

    def signs(vectors: Any, side: str, head: int) -> Any:
        (one, two), (b1, b2) = (
            [np.asarray(w[head], dtype=np.float64) for w in weights[f"{side}_{kind}"]]
            for kind in ("matrix", "bias")
        )
        inner = vectors @ one + b1
        return np.sign(inner / (1 + np.exp(-inner)) @ two + b2)

    for unit in load_units(trace.layer(0), 0, torch.device("cpu")):
        for h, rows in enumerate(replayed(of(hashes), unit, 9)[1]):
            head = unit.group.heads.start + h
            for place, position in enumerate(POSITIONS):
                query = signs(unit.queries[h, position].double().numpy(), "query", head)
                scores = signs(unit.keys[: position + 1].double().numpy(), "key", head) @ query
                edge = np.sort(scores)[-9]
                assert set(np.flatnonzero(scores > edge)) <= rows[place]
                assert rows[place] <= set(np.flatnonzero(scores >= edge)) and len(rows[place]) == 9


def test_sampled_keys_count_by_the_inverse_of_their_chance(trace: Trace) -> None:
    """Averaged over seeds, adaptive sampling and vAttention come close to full attention; drawn
    keys without their weights would not, since sinks and recent keys then weigh too much."""
    unit = next(iter(load_units(trace.layer(0), 0, torch.device("cpu"))))
    always = "SinkMasker:sink_size=2+LocalMasker:window_size=4+OracleTopK:heavy_size=8"
    sampled = (
        f"{always}+AdaptiveSamplingMasker:base_rate_sampling=0.3:epsilon=0.3:delta=0.3"
        ":init_offset=2:local_offset=4"
    )
    exact = replayed("sparse-attention-hub:maskers=LocalMasker:window_size=1.0", unit, 1)[0]
    best = replayed(of(always), unit, 1)[0]
    drawn = [replayed(f"{of(sampled)},seed={seed}", unit, 1)[0] for seed in range(30)]
    mean = torch.stack(drawn).mean(dim=0)
    assert (mean - exact).norm() < 0.5 * (best - exact).norm()
    assert torch.equal(drawn[3], replayed(f"{of(sampled)},seed=3", unit, 1)[0])


def test_a_sample_repeats_in_any_order(trace: Trace) -> None:
    specs = [of("RandomSamplingMasker:sampling_rate=0.2"), of("OracleTopK")]
    rows = [
        analyze(trace, order, [5], min_context=20, keep_exact=False).metrics
        for order in (specs, specs[:1])
    ]
    first = rows[0][rows[0]["method"] == rows[1]["method"].iloc[0]]
    np.testing.assert_array_equal(first["mean"], rows[1]["mean"])


@pytest.mark.parametrize(
    ("maskers", "message"),
    [
        ("OracleTopKK", r"no masker 'OracleTopKK': expected .*OracleTopK"),
        ("OracleTopK:size=3", r"OracleTopK has no 'size': it has heavy_size"),
        ("SinkMasker", r"SinkMasker: .*sink_size"),
        ("SinkMasker:sink_size=-1", r"sink_size must be > 0"),
        ("PQCache:pq_sub_dim=2:pq_bits=4", r"PQCache of sparse-attention-hub masks nothing"),
        (
            "MagicPig:lsh_l=2:lsh_k=2+RandomSamplingMasker:sampling_rate=0.2",
            "Only one sampling masker",
        ),
    ],
)
def test_mistakes(trace: Trace, maskers: str, message: str) -> None:
    with pytest.raises(RetraceError, match=message):
        analyze(trace, [of(maskers)], [4], min_context=50, keep_exact=False)


def test_a_mistake_in_the_list() -> None:
    with pytest.raises(RetraceError, match="not of the form Name:parameter=value"):
        parse_spec(of("SinkMasker:sink_size"))
