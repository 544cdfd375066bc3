"""Small networks and gradient descent, for methods that are calibrated on other sequences."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from retrace.analyze.units.past import Past


def drawn_queries(pasts: Sequence[Past], count: int, random: torch.Generator) -> tuple[int, Tensor]:
    """Which of the sequences, and rows (count,) of its queries, each drawn with replacement."""
    which = int(torch.randint(len(pasts), (), generator=random))
    past = pasts[which]
    rows = torch.randint(len(past.query_positions), (count,), generator=random)
    return which, rows.to(past.keys.device)


def descend(descent: torch.optim.Optimizer, steps: int, loss: Callable[[], Tensor]) -> None:
    """Take steps down a loss, which is computed anew for each."""
    for _ in range(steps):
        descent.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        descent.step()


def initial_weights(heads: int, sizes: Sequence[int], random: torch.Generator) -> list[Tensor]:
    """Weights (heads, inputs + 1, outputs) of the layers of a network for every head, between
    `sizes`: they keep the variance of their inputs, and have a last row for an input of 1."""
    return [
        torch.nn.functional.pad(
            torch.randn(heads, inputs, outputs, generator=random) * (2 / inputs) ** 0.5,
            (0, 0, 0, 1),
        )
        for inputs, outputs in pairwise(sizes)
    ]


def network(layers: Sequence[Tensor], vectors: Tensor) -> Tensor:
    """What the layers of `initial_weights` make, with SiLU between them, of vectors
    (vectors, channels) or (heads, vectors, channels): (heads, vectors, outputs), for as many heads
    as there are vectors of."""
    for i, layer in enumerate(layers):
        if i:
            vectors = torch.nn.functional.silu(vectors)
        if vectors.dim() == 3:
            layer = layer[: len(vectors)]
        vectors = vectors @ layer[:, :-1] + layer[:, -1:]
    return vectors
