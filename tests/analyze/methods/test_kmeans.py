"""Methods that put keys into clusters, against NumPy in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from retrace.analyze import Past
from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.methods.toolkit.kmeans import (
    Compare,
    by_direction,
    by_distance,
    in_common_steps,
    kmeans,
    nearest,
)
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import LayerRules, Trace


@pytest.fixture
def unit(make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]) -> Unit:
    """Two query heads that share a kv head."""
    return next(load_units(make_trace([rules(heads=4)], [60]).layer(0), 0, torch.device("cpu")))


def test_kmeans_finds_what_is_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, -9.0]])
    wanted = torch.arange(90) // 30
    centroids, labels = kmeans(centres[wanted] + torch.randn(90, 2, generator=generator), 3, 10)
    assert torch.equal(labels, wanted)
    torch.testing.assert_close(centroids, centres, atol=0.6, rtol=0)


def test_kmeans_lowers_the_distance_and_ends_at_means() -> None:
    vectors = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    distances = []
    for iterations in (0, 1, 5, 100):
        centroids, labels = kmeans(vectors, 8, iterations)
        distances.append(float((vectors - centroids[labels]).square().sum()))
        closest = torch.cdist(vectors, centroids).argmin(dim=-1)
        assert torch.equal(labels, closest)
    assert distances == sorted(distances, reverse=True)
    means = torch.stack([vectors[labels == c].mean(dim=0) for c in range(8)])
    torch.testing.assert_close(centroids, means)


def test_more_clusters_than_vectors() -> None:
    vectors = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    centroids, labels = kmeans(vectors, 64, 5)
    assert torch.equal(centroids, vectors)
    assert labels.tolist() == [0, 1, 2, 3]
    assert nearest(vectors[1:2], centroids).tolist() == [1]


@pytest.mark.parametrize("compare", [by_distance, by_direction])
@pytest.mark.parametrize("front", [(), (3,)])
def test_sets_in_common_steps_have_the_clusters_of_their_own(
    compare: Compare, front: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths, counts = (5, 40, 64, 7), (5, 6, 30, 1)
    sets = [torch.randn(*front, length, 8, generator=generator) for length in lengths]
    found = in_common_steps(sets, counts, 10, compare)
    for own, count, (centroids, labels) in zip(sets, counts, found, strict=True):
        wanted = kmeans(own, count, 10, compare)
        torch.testing.assert_close(centroids, wanted[0])
        assert torch.equal(labels, wanted[1])


def test_every_index_in_front_is_clustered_by_itself() -> None:
    vectors = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(4))
    for own, centroids, labels in zip(vectors, *kmeans(vectors, 6, 10), strict=True):
        wanted = kmeans(own, 6, 10)
        torch.testing.assert_close(centroids, wanted[0])
        assert torch.equal(labels, wanted[1])


def test_clusterkv_scores_a_key_as_its_cluster(unit: Unit) -> None:
    method = parse_spec("clusterkv:size=6").method
    assert isinstance(method, ScoreMethod)
    past = Past(unit, 0, 48)
    centroids, labels = method.build(past)
    keys = past.keys.double().numpy()
    scores = method.scores((centroids, labels), past.queries, torch.arange(48)).double().numpy()
    queries = past.queries.double().numpy()
    assert len(centroids) == 5  # of 32 keys, since 16 are sinks
    for cluster in range(5):
        members = labels.numpy() == cluster
        centroid = keys[16:][members[16:]].mean(axis=0)
        wanted = np.broadcast_to((queries @ centroid)[..., None], scores[..., members].shape)
        np.testing.assert_allclose(scores[..., members], wanted, atol=1e-4)


def test_clusterkv_joins_keys_that_point_the_same_way(unit: Unit) -> None:
    centroids, labels = parse_spec("clusterkv:size=6").method.build(Past(unit, 0, 48))
    keys, means = unit.keys[:48].double().numpy(), centroids.double().numpy()
    cosines = keys @ means.T / np.linalg.norm(keys, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    chosen = np.take_along_axis(cosines, labels.numpy()[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, cosines.max(axis=1), atol=1e-6)


def test_pqcache_with_a_code_for_every_key_is_exact(unit: Unit) -> None:
    method = parse_spec("pqcache:parts=3,bits=6").method
    assert isinstance(method, ScoreMethod)
    state = method.build(Past(unit, 0, 60))
    queries = unit.queries * unit.group.rules.scale
    scores = method.scores(state, queries, torch.arange(60))
    wanted = queries.double() @ unit.keys.double().T
    torch.testing.assert_close(scores.double(), wanted, atol=1e-4, rtol=0)


def test_pqcache_encodes_later_keys_with_the_centroids_there_are(unit: Unit) -> None:
    method = parse_spec("pqcache:parts=2,bits=2").method
    before, codes = method.build(Past(unit, 0, 40))
    after, all_codes = method.extend((before, codes), Past(unit, 40, 60))
    assert torch.equal(before, after)
    assert torch.equal(all_codes[:, :40], codes)
    parts = unit.keys[40:].tensor_split(2, dim=-1)
    for part, centroids, own in zip(parts, before, all_codes[:, 40:], strict=True):
        assert torch.equal(own, torch.cdist(part, centroids).argmin(dim=-1))
