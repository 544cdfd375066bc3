"""Learning by gradient descent, as methods do that are calibrated on other sequences."""

from collections.abc import Callable

import torch
from torch import Tensor


def descend(descent: torch.optim.Optimizer, steps: int, loss: Callable[[], Tensor]) -> None:
    """Take steps down a loss, which is computed anew for each."""
    for _ in range(steps):
        descent.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        descent.step()
