"""Bounds of means over further sequences: by definition, and how often they are kept."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from retrace.analyze.recommendation.bounds import ASSUMES, ENOUGH, moderated, upper_bounds


def ones(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.ones(shape)


def test_one_head_has_students_bound() -> None:
    values = np.array([[0.2, 0.3, 0.25, 0.33]])
    mean, deviation = values.mean(), values.std(ddof=1)
    reach = stats.t.ppf(0.95, 3) * math.sqrt(1 / 4 + 1 / 5)
    expected = mean * math.exp(reach * deviation / mean)
    assert upper_bounds(values, ones(1, 4), ones(1, 5)) == pytest.approx(expected)


def test_sequences_count_as_often_as_their_queries() -> None:
    rng = np.random.default_rng(0)
    values, new = rng.random((6, 5)) + 1, ones(6, 3)
    plain = upper_bounds(values, ones(6, 5), new)
    np.testing.assert_allclose(upper_bounds(values, 7 * ones(6, 5), 9 * new), plain)
    none = np.pad(ones(6, 5), ((0, 0), (0, 1)))
    np.testing.assert_allclose(upper_bounds(np.pad(values, ((0, 0), (0, 1))), none, new), plain)
    heavy = ones(6, 5)
    heavy[:, 0] = 1000.0  # next to one sequence alone, whatever the others say
    assert (upper_bounds(values, heavy, new) > values[:, 0]).all()


def test_what_has_no_bound() -> None:
    assert np.isnan(upper_bounds(np.array([[0.1, 0.2]]), np.array([[5.0, 0.0]]), ones(1, 2)))
    assert np.isnan(upper_bounds(np.array([[0.1, 0.2]]), ones(1, 2), np.zeros((1, 2))))


def test_what_does_not_vary_is_its_own_bound() -> None:
    values = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3], [0.2, 0.3, 0.1]])
    bounds = upper_bounds(values, ones(4, 3), ones(4, 3))
    assert bounds[:2].tolist() == [0.0, 0.5] and (bounds[2:] > 0.3).all()


def test_variances_lend_each_other_degrees_of_freedom() -> None:
    """True ones as the model has them are met better, and known by as many degrees as it says."""
    rng = np.random.default_rng(0)
    true = 0.02 * 10 / rng.chisquare(10, 2000)
    seen = true * rng.chisquare(4, 2000) / 4
    drawn, freedom = moderated(seen, np.full(2000, 4.0))
    assert freedom == pytest.approx(14, rel=0.2)
    assert np.abs(np.log(drawn / true)).mean() < 0.7 * np.abs(np.log(seen / true)).mean()
    alike, pooled = moderated(rng.chisquare(4, 2000) / 4, np.full(2000, 4.0))
    assert (pooled > 200).all() and alike.std() < 0.1


@pytest.mark.parametrize("sequences", [ENOUGH, 8])
def test_the_cheapest_setting_meets_its_target_in_all_heads(sequences: int) -> None:
    """Ninety heads choose among nine budgets on one half; the other half meets the target in all
    of them at once as often as it is said to, and hardly ever where means choose."""
    rng, trials, heads, target = np.random.default_rng(0), 150, 90, 0.1
    met = {"bound": 0, "mean": 0}
    counts = ones(heads, sequences)
    for _ in range(trials):
        spread = 0.15 * np.sqrt(8 / rng.chisquare(8, heads))[:, None]
        scale = rng.uniform(0.1, 0.6, heads)[:, None]
        # What makes a sequence hard for one budget makes it hard for the next, in part.
        shared = rng.normal(size=(heads, 2 * sequences))
        chosen = {rule: np.full(heads, -1) for rule in met}
        verify = []
        for budget in range(9):  # the dearest first
            noise = 0.8 * shared + 0.6 * rng.normal(size=shared.shape)
            values = scale * 0.1 * 1.4**budget * np.exp(spread * noise)
            ours, new = values[:, :sequences], values[:, sequences:]
            verify.append(new.mean(axis=1))
            chosen["bound"][upper_bounds(ours, counts, counts) <= target] = budget
            chosen["mean"][ours.mean(axis=1) <= target] = budget
        for rule, budgets in chosen.items():
            reached = np.array(verify)[budgets, np.arange(heads)]
            met[rule] += bool((reached <= target)[budgets >= 0].all())
    assert met["bound"] / trials >= 0.95
    assert met["mean"] / trials < 0.1


def held_together(losses: Callable[[int], np.ndarray[Any, Any]], trials: int = 150) -> float:
    """How often the bounds of all heads hold together, of 9 sequences for 8 others."""
    held = 0
    for _ in range(trials):
        values = losses(17)
        heads = len(values)
        bounds = upper_bounds(values[:, :9], ones(heads, 9), ones(heads, 8))
        held += bool((values[:, 9:].mean(axis=1) <= bounds).all())
    return held / trials


def test_what_the_promise_assumes() -> None:
    """Heads that vary alike keep it; rare hard texts break it, as is said where it stands."""
    rng = np.random.default_rng(0)

    def noise(count: int, spread: float) -> np.ndarray[Any, Any]:
        return np.exp(spread * rng.normal(size=(90, count)))

    assert held_together(lambda n: noise(n, 0.15)) > 0.92
    for_all = held_together(lambda n: noise(n, 0.1) * np.where(rng.random(n) < 0.05, 3, 1))
    assert 0.6 < for_all < 0.9
    alone = held_together(lambda n: noise(n, 0.1) * np.where(rng.random((90, n)) < 0.02, 2, 1))
    assert alone < 0.5
    for words in ("77 to 82 %", "31 %"):
        assert words in ASSUMES
