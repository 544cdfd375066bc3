"""Tokens are drawn as often as their probabilities say."""

import numpy as np
import pytest
import torch

from retrace.capture.recording.sampling import Sampling

LOGITS = torch.tensor([0.0, 2.0, -torch.inf, 1.0, 1.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.01])
def test_frequencies(temperature: float, top_p: float) -> None:
    weights = torch.softmax(LOGITS.double() / temperature, 0).numpy()
    order = np.argsort(-weights, kind="stable")
    kept = order[: int((np.cumsum(weights[order]) < top_p).sum()) + 1]
    expected = np.zeros(5)
    expected[kept] = weights[kept] / weights[kept].sum()
    writer = Sampling(temperature=temperature, top_p=top_p, decode=str).of_sequence(0)
    count = 4000
    found = np.bincount([writer.choose(LOGITS) for _ in range(count)], minlength=5) / count
    # Five standard deviations.
    assert np.abs(found - expected).max() < 5 * 0.5 / np.sqrt(count)
    assert (found[expected == 0] == 0).all()


def test_the_likeliest() -> None:
    writer = Sampling(decode=str).of_sequence(0)
    assert {writer.choose(LOGITS) for _ in range(20)} == {1}


def test_sequences_are_drawn_apart() -> None:
    sampling = Sampling(temperature=1.0, seed=3, decode=str)
    flat = torch.zeros(1000)
    first, second, again = (sampling.of_sequence(s) for s in (0, 1, 0))
    drawn = [[writer.choose(flat) for _ in range(20)] for writer in (first, second, again)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_what_ends_a_text() -> None:
    def decode(tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    writer = Sampling(stop=("ab", "\n"), decode=decode).of_sequence(0)
    ended = [writer.ended([ord(c) for c in text]) for text in ("a", "ba", "xab", "xaby", "\n")]
    assert ended == [False, False, True, True, True]
