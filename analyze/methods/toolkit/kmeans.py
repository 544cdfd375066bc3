"""k-means, the same on every run."""

from collections.abc import Callable

import torch
from torch import Tensor

Assign = Callable[[Tensor, Tensor], Tensor]
"""The cluster of each vector (vectors,) int64, of vectors and centroids."""


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid of least Euclidean distance to each vector (vectors,) int64."""
    # ||v||^2 is the same for all centroids.
    closeness = vectors @ centroids.T - centroids.square().sum(dim=-1) / 2
    return closeness.argmax(dim=-1)


def most_alike(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid of largest cosine to each vector (vectors,) int64."""
    return (vectors @ torch.nn.functional.normalize(centroids, dim=-1).T).argmax(dim=-1)


def kmeans(
    vectors: Tensor, count: int, iterations: int, assign: Assign = nearest
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, from vectors evenly spaced along the sequence.

    Here rather than from a library, since what a method finds must not depend on a seed or on how
    many threads there are, and runs on the device that the keys are on.

    Args:
        vectors: (vectors, channels).
        count: clusters; as many as there are vectors if that is fewer.
        iterations: rounds of assignment and mean.
        assign: gives each vector its centroid: the nearest, if not said otherwise.

    Returns:
        centroids (clusters, channels), and the cluster of each vector (vectors,) int64, ties to the
        earlier. A cluster that loses all its vectors stays where it was.
    """
    count = min(count, len(vectors))
    spaced = torch.arange(count, device=vectors.device) * len(vectors) // count
    centroids = vectors[spaced]
    for _ in range(iterations):
        labels = assign(vectors, centroids)
        sums = totals(vectors, labels, count)
        sizes = torch.bincount(labels, minlength=count)[:, None]
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    return centroids, assign(vectors, centroids)


def totals(vectors: Tensor, labels: Tensor, count: int) -> Tensor:
    """The sum of the vectors (vectors, channels) with each of `count` labels (count, channels)."""
    if vectors.is_cuda:  # where adding up in place comes out otherwise each time
        members = labels == torch.arange(count, device=labels.device)[:, None]
        return members.to(vectors.dtype) @ vectors
    return vectors.new_zeros(count, vectors.shape[1]).index_add_(0, labels, vectors)
