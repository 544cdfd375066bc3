"""Columns and diagonals of attention, and the keys that a block of queries attends by them."""

import torch
from torch import Tensor


def columns_and_diagonals(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """What the last queries attend to by position, and by how far back it is.

    Args:
        probabilities: (group, queries, keys) of queries at the positions of the last keys.

    Returns:
        Sums over the queries (group, keys) for each key, and for each distance between a query and
        a key, from 0 on.
    """
    queries, keys = probabilities.shape[1:]
    # The last query's row read backwards is in order of distance, the one before begins one late.
    backwards = torch.nn.functional.pad(probabilities.flip(-1), (0, queries))
    late = torch.arange(queries - 1, -1, -1, device=probabilities.device)[:, None]
    places = late + torch.arange(keys, device=probabilities.device)
    along = backwards.gather(-1, places.expand(len(backwards), -1, -1))
    return probabilities.sum(dim=1), along.sum(dim=1)


def keys_on_diagonals(rank: Tensor, queries: int, end: int) -> Tensor:
    """The rank of the best diagonal that runs through each key, for a block of consecutive queries,
    all of which attend the same keys.

    Args:
        rank: of the diagonal at each distance between a query and a key (group, distances), 0 for
            the best.
        queries: of the block.
        end: one past the last of them.

    Returns:
        (group, end), the number of distances where none runs through.
    """
    distances = rank.shape[-1]
    # Of a key so far before the block's last query: the distances to each of the queries.
    far = torch.nn.functional.pad(
        rank.float(), (queries - 1, max(0, end - distances)), value=distances
    )
    least = -torch.nn.functional.max_pool1d(-far[:, None], queries, stride=1)[:, 0, :end]
    return least.flip(-1).round().to(rank.dtype)
