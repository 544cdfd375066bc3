"""k-means, the same on every run."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

TOGETHER = 1 << 25
"""Products of vectors and centroids that a GPU takes in common steps: so many take it longer than
asking for the steps does, and sets that follow each other are then about as large."""

Compare = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""What vectors are compared with, of centroids (..., clusters, channels): a vector joins the
centroid whose product, of the vectors given, is largest, less an offset (..., clusters) if any."""


def by_distance(centroids: Tensor) -> tuple[Tensor, Tensor | None]:
    """A vector joins the centroid of least Euclidean distance."""
    # ||v||^2 is the same for all centroids.
    return centroids, centroids.square().sum(dim=-1) / 2


def by_direction(centroids: Tensor) -> tuple[Tensor, Tensor | None]:
    """A vector joins the centroid of largest cosine."""
    return normalize(centroids, dim=-1), None


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid (..., clusters, channels) of least Euclidean distance to each vector
    (..., vectors, channels): (..., vectors) int64."""
    return assigned(vectors, centroids, by_distance)


def most_alike(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid (..., clusters, channels) of largest cosine to each vector
    (..., vectors, channels): (..., vectors) int64."""
    return assigned(vectors, centroids, by_direction)


def assigned(vectors: Tensor, centroids: Tensor, compare: Compare) -> Tensor:
    """The centroid (..., clusters, channels) that each vector (..., vectors, channels) joins:
    (..., vectors) int64, ties to the earlier."""
    compared, offsets = compare(centroids)
    closeness = vectors @ compared.mT
    if offsets is not None:
        closeness -= offsets[..., None, :]
    return closeness.argmax(dim=-1)


def kmeans(
    vectors: Tensor, count: int, iterations: int, compare: Compare = by_distance
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, from vectors evenly spaced along the sequence.

    Here rather than from a library, since what a method finds must not depend on a seed or on how
    many threads there are, and runs on the device that the keys are on.

    Args:
        vectors: (..., vectors, channels); each index in front has clusters of its own.
        count: clusters, one at least; as many as there are vectors if that is fewer.
        iterations: rounds of assignment and mean.
        compare: which centroid a vector joins: the nearest, if not said otherwise.

    Returns:
        centroids (..., clusters, channels), and the cluster of each vector (..., vectors) int64,
        ties to the earlier. A cluster that loses all its vectors stays where it was.
    """
    length = vectors.shape[-2]
    if not length:
        return vectors, vectors[..., 0].long()
    count = min(count, length)
    centroids = vectors[..., torch.arange(count, device=vectors.device) * length // count, :]
    for _ in range(iterations):
        centroids = _moved(vectors, assigned(vectors, centroids, compare), centroids)
    return centroids, assigned(vectors, centroids, compare)


def kmeans_of_each(
    sets: Sequence[Tensor], counts: Sequence[int], iterations: int, compare: Compare = by_distance
) -> list[tuple[Tensor, Tensor]]:
    """What `kmeans` finds for several sets of vectors, each with its own number of clusters: sets
    (..., vectors, channels) that differ in how many vectors they have.

    On a GPU many sets take the steps of one: a step is over sooner than the next one is asked for.
    """
    counts = [min(count, own.shape[-2]) for own, count in zip(sets, counts, strict=True)]
    if not sets or not sets[0].is_cuda:
        return [kmeans(own, n, iterations, compare) for own, n in zip(sets, counts, strict=True)]
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < len(sets):
        rest = slice(len(found), None)
        some = slice(len(found), len(found) + _taken_together(sets[rest], counts[rest]))
        found += in_common_steps(sets[some], counts[some], iterations, compare)
    return found


def in_common_steps(
    sets: Sequence[Tensor], counts: Sequence[int], iterations: int, compare: Compare
) -> list[tuple[Tensor, Tensor]]:
    """What `kmeans_of_each` gives, of sets with at least as many vectors as clusters.

    Sets are filled up to the size of the largest, with vectors that belong to no cluster and with
    clusters that no vector joins.
    """
    if len(sets) == 1 or not max(counts):
        return [kmeans(own, n, iterations, compare) for own, n in zip(sets, counts, strict=True)]
    lengths = [own.shape[-2] for own in sets]
    most, clusters, device = max(lengths), max(counts), sets[0].device
    vectors = torch.stack([pad(s, (0, 0, 0, most - n)) for s, n in zip(sets, lengths, strict=True)])
    each = (len(sets), *[1] * (vectors.dim() - 2))
    length, count = (torch.tensor(of, device=device).view(each) for of in (lengths, counts))
    every = torch.arange(clusters, device=device)
    unused, filled_up = every >= count, torch.arange(most, device=device) >= length
    spaced = (every * length // count.clamp(min=1)).clamp(max=most - 1)[..., None]
    centroids = vectors.gather(-2, spaced.expand(*vectors.shape[:-2], -1, vectors.shape[-1]))

    def used(centroids: Tensor) -> tuple[Tensor, Tensor]:
        compared, offsets = compare(centroids)
        return compared, torch.where(unused, torch.inf, 0.0 if offsets is None else offsets)

    for _ in range(iterations):
        labels = assigned(vectors, centroids, used).masked_fill_(filled_up, clusters)
        centroids = _moved(vectors, labels, centroids)
    labels = assigned(vectors, centroids, used)
    # Copies, since a view of one would hold on to all.
    return [
        (centroids[i, ..., :c, :].clone(), labels[i, ..., :n].clone())
        for i, (n, c) in enumerate(zip(lengths, counts, strict=True))
    ]


def _taken_together(sets: Sequence[Tensor], counts: Sequence[int]) -> int:
    """How many of the first sets take common steps, filled up to the size of the largest."""
    longest = most = 0
    for i, (own, count) in enumerate(zip(sets, counts, strict=True)):
        longest, most = max(longest, own[..., 0].numel()), max(most, count)
        if i and (i + 1) * longest * most > TOGETHER:
            return i
    return len(sets)


def _moved(vectors: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """The mean of the vectors that joined each centroid; a centroid that none joined."""
    sums, sizes = totals(vectors, labels, centroids.shape[-2])
    return torch.where(sizes[..., None] > 0, sums / sizes[..., None], centroids)


def totals(vectors: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sum of the vectors (..., vectors, channels) with each of `count` labels
    (..., count, channels), and how many they are (..., count), in the dtype of the vectors. Labels
    (..., vectors) are int64; the label `count` is left out."""
    *front, length = labels.shape
    if vectors.is_cuda:  # where adding up in place comes out otherwise each time
        members = vectors.new_zeros(*front, count + 1, length)
        members = members.scatter_(-2, labels[..., None, :], 1.0)[..., :count, :]
        return members @ vectors, members.sum(dim=-1)
    slots, places = labels, prod(front) * (count + 1)
    if front:
        first = torch.arange(0, places, count + 1, device=labels.device)
        slots = (labels + first.view(*front, 1)).flatten()
    sums = vectors.new_zeros(places, vectors.shape[-1])
    sums.index_add_(0, slots, vectors.flatten(0, -2))
    sizes = torch.bincount(slots, minlength=places).to(vectors.dtype)
    if not front:
        return sums[:count], sizes[:count]
    return (
        sums.view(*front, count + 1, -1)[..., :count, :],
        sizes.view(*front, count + 1)[..., :count],
    )
