"""Mean and variance of a stream, merged part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of many streams at once (arrays of one shape).

    Parts are merged by the pairwise update of Chan, Golub and LeVeque (1979), so that no sample is
    kept and no large number is subtracted from another.
    """

    count: Array
    mean: Array
    squares: Array

    @classmethod
    def of(cls, values: Tensor, counted: Tensor) -> Self:
        """Moments over the last axis of values (..., samples), where `counted` (..., samples,
        broadcast) is true. NaN is never counted."""
        counted = counted & ~values.isnan()
        values = values.double().masked_fill(~counted, 0.0)
        count = counted.sum(dim=-1).double().expand(values.shape[:-1])
        mean = values.sum(dim=-1) / count.clamp(min=1)
        deviations = (values - mean[..., None]).masked_fill(~counted, 0.0)
        squares = (deviations * deviations).sum(dim=-1)
        return cls(*(part.cpu().numpy() for part in (count, mean, squares)))

    @classmethod
    def of_buckets(cls, values: Tensor, counted: Tensor, bucket: Tensor, buckets: int) -> Self:
        """The same of each bucket's samples (buckets, ...), for the bucket of each sample
        (samples,) int64."""
        counted = counted & ~values.isnan()
        values = values.double().masked_fill(~counted, 0.0)
        # A product with which sample is in which bucket, in place of a pass for each bucket.
        within = torch.nn.functional.one_hot(bucket, buckets).double()
        count = counted.double() @ within
        mean = values @ within / count.clamp(min=1)
        deviations = (values - mean[..., bucket]).masked_fill(~counted, 0.0)
        squares = (deviations * deviations) @ within
        return cls(*(part.movedim(-1, 0).cpu().numpy() for part in (count, mean, squares)))

    def merge(self, other: Self) -> Self:
        """The moments of both parts together."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        squares = self.squares + other.squares + delta**2 * self.count * share
        return type(self)(count, mean, squares)

    def std(self) -> Array:
        """Standard deviation of the samples (ddof 0); NaN where there are none."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(np.divide(self.squares, self.count))

    def merge_longer(self, other: Self) -> Self:
        """The same where either may have more entries along the first axis."""
        size = max(len(self.count), len(other.count))
        ours, theirs = (
            part if len(part.count) == size else part.spread(range(len(part.count)), size)
            for part in (self, other)
        )
        return ours.merge(theirs)

    def take(self, index: int | list[int]) -> Self:
        """One entry of the first axis, or some."""
        return type(self)(self.count[index], self.mean[index], self.squares[index])

    def spread(self, places: Sequence[int], size: int, axis: int = 0) -> Self:
        """The entries of an axis at these places of a longer one, the others empty."""

        def put(part: Array) -> Array:
            whole = np.zeros((*part.shape[:axis], size, *part.shape[axis + 1 :]))
            whole[(slice(None),) * axis + (list(places),)] = part
            return whole

        return type(self)(put(self.count), put(self.mean), put(self.squares))

    @classmethod
    def stack(cls, parts: list[Self], axis: int) -> Self:
        """Several streams side by side along an existing axis."""
        return cls(
            np.concatenate([p.count for p in parts], axis),
            np.concatenate([p.mean for p in parts], axis),
            np.concatenate([p.squares for p in parts], axis),
        )


def empty(shape: tuple[int, ...]) -> Moments:
    """Moments of no samples."""
    return Moments.of(torch.empty(*shape, 0), torch.empty(*shape, 0, dtype=torch.bool))
