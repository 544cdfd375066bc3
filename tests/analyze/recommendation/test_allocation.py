"""The path over heads is what trying every choice comes to, wherever it stops."""

import itertools

import numpy as np
import pytest

from retrace.analyze.recommendation.allocation import hull, path

SMALL = 1e-9


def heads(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Four heads of two to five options; losses fall with bytes, but neither evenly nor always."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, 4)
    reads = [np.sort(rng.uniform(0.1, 1, n)) for n in sizes]
    losses = [rng.uniform(0, 1, n) * (1.2 - read) for n, read in zip(sizes, reads, strict=True)]
    return reads, losses


def every_choice(reads: list[np.ndarray], losses: list[np.ndarray]) -> list[tuple[float, float]]:
    return [
        (
            sum(read[i] for read, i in zip(reads, options, strict=True)),
            sum(loss[i] for loss, i in zip(losses, options, strict=True)),
        )
        for options in itertools.product(*(range(len(read)) for read in reads))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_after_each_step_nothing_is_better(seed: int) -> None:
    reads, losses = heads(seed)
    found, choices = path(reads, losses), every_choice(reads, losses)
    assert len(found.steps) > 1
    for count, (read, loss) in enumerate(zip(found.reads, found.losses, strict=True)):
        options = found.options(count)
        assert sum(r[i] for r, i in zip(reads, options, strict=True)) == pytest.approx(read)
        assert sum(x[i] for x, i in zip(losses, options, strict=True)) == pytest.approx(loss)
        assert min(r for r, x in choices if x <= loss + SMALL) == pytest.approx(read)
        assert min(x for r, x in choices if r <= read + SMALL) == pytest.approx(loss)


def test_between_steps_the_gap_holds_the_best() -> None:
    rng = np.random.default_rng(0)
    better = 0
    for seed in range(40):
        reads, losses = heads(seed)
        found, choices = path(reads, losses), every_choice(reads, losses)
        for share in rng.uniform(0, 1, 5):
            loss = found.losses[-1] + share * (found.losses[0] - found.losses[-1])
            count = min(n for n, kept in enumerate(found.losses) if kept <= loss)
            best = min(r for r, x in choices if x <= loss + SMALL)
            assert found.least_read(loss) - SMALL <= best <= found.reads[count] + SMALL
            better += best < found.reads[count] - SMALL
            most = found.reads[0] + share * (found.reads[-1] - found.reads[0])
            count = max(n for n, read in enumerate(found.reads) if read <= most)
            best = min(x for r, x in choices if r <= most + SMALL)
            assert found.least_loss(most) - SMALL <= best <= found.losses[count] + SMALL
    assert better > 20  # there is a gap, which the bound has to tell


def test_hulls() -> None:
    reads = np.array([1.0, 2.0, 3.0, 4.0, 4.0, 5.0])
    losses = np.array([9.0, 8.0, 3.0, 2.0, 2.5, 2.0])
    assert hull(reads, losses) == [0, 2, 3]  # 1 is above the line, 4 dearer, and 5 saves nothing
    assert hull(np.array([1.0]), np.array([0.0])) == [0]
    found = path([reads], [losses])
    assert [found.enough(lambda n, most=most: n >= most) for most in (0, 1, 2)] == [0, 1, 2]
    assert found.enough(lambda n: n != 1) == 2  # a chance before is none
    assert [found.most(lambda n, most=most: n <= most) for most in (-1, 0, 1, 2)] == [-1, 0, 1, 2]
