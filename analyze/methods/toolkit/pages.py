"""Pages of consecutive keys, as each query sees them: its own page only up to the query."""

import torch
from torch import Tensor


def split(keys: Tensor, size: int) -> Tensor:
    """Keys (keys, channels) as pages (pages, size, channels), with zeros after the last key."""
    padded = torch.nn.functional.pad(keys, (0, 0, 0, -len(keys) % size))
    return padded.view(-1, size, keys.shape[1])


def extremes(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least and largest value of each channel in each key's page, up to that key: both like keys
    (keys, channels)."""
    paged = split(keys, size)
    low, high = paged.cummin(dim=1).values, paged.cummax(dim=1).values
    return low.flatten(0, 1)[: len(keys)], high.flatten(0, 1)[: len(keys)]


def means(keys: Tensor, size: int) -> Tensor:
    """Mean of the keys in each key's page, up to that key (keys, channels)."""
    sums = split(keys, size).cumsum(dim=1)
    counts = torch.arange(1, size + 1, device=keys.device)[:, None]
    return (sums / counts).flatten(0, 1)[: len(keys)]


def last_keys(end: int, size: int, device: torch.device) -> Tensor:
    """The last key of each page (pages,) int64 of the keys before `end`."""
    last = torch.arange(size - 1, end + size - 1, size, device=device)
    return last.clamp(max=end - 1)


def with_own(scores: Tensor, own: Tensor, positions: Tensor, size: int) -> Tensor:
    """Scores of pages (group, queries, pages) with `own` (group, queries) for the page that each
    query is in, at positions (queries,)."""
    page = (positions // size).expand(scores.shape[:2])
    return scores.scatter(-1, page[..., None], own[..., None])
