"""Random rotations and hyperplanes, and the sign codes that they give."""

import torch
from torch import Tensor

from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.units import kernels
from retrace.analyze.units.unit import HeadGroup


def padded(channels: int) -> int:
    """The power of two that vectors are padded to with zeros before a Hadamard rotation."""
    return 1 << (channels - 1).bit_length()


def hadamard(vectors: Tensor) -> Tensor:
    """Vectors (..., channels) rotated by the orthonormal Hadamard matrix (..., padded channels).

    Zeros are appended to reach a power of two; norms and products stay what they were.
    """
    channels = vectors.shape[-1]
    width = padded(channels)
    rotated = torch.nn.functional.pad(vectors, (0, width - channels)).contiguous()
    half = 1
    while half < width:  # the butterflies of the fast transform
        pairs = rotated.view(*rotated.shape[:-1], -1, 2, half)
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        rotated = torch.stack([one + other, one - other], dim=-2).flatten(-3)
        half *= 2
    rotated /= width**0.5
    return rotated


def hyperplanes(seed: int, group: HeadGroup, count: int, device: torch.device) -> Tensor:
    """Normals (channels, count) of random hyperplanes, standard normal, for one kv head."""
    channels = torch.arange(group.rules.key_dim, device=device)
    normals: Tensor = torch.special.ndtri(uniform(seed, group, channels, count, heads=1)[0])
    return normals


def signs(vectors: Tensor) -> Tensor:
    """1 where an element is at least 0, else -1, so that a product of codes of n bits is n less
    twice their Hamming distance: exact in float32, and faster here than counting packed bits."""
    return torch.where(vectors >= 0, 1.0, -1.0)


def numbers(bits: Tensor) -> Tensor:
    """Bits (..., bits) as integers (...) int32, the first bit lowest."""
    places = 1 << torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device)
    read: Tensor = (bits.to(torch.int32) * places).sum(dim=-1, dtype=torch.int32)
    return read


def collisions(queries: Tensor, keys: Tensor) -> Tensor:
    """In how many tables (group, queries, keys) int16 a query's bucket (group, queries, tables)
    int32 is a key's (tables, keys) int32."""
    rows = queries.flatten(0, 1)
    if kernels.usable(keys):
        from retrace.analyze.methods.toolkit.kernels.collisions import collisions
    elif keys.device.type == "cpu":
        from retrace.analyze.methods.toolkit.compiled_collisions import collisions
    else:
        collisions = plain_collisions
    return collisions(rows, keys).view(*queries.shape[:2], -1)


def plain_collisions(queries: Tensor, keys: Tensor) -> Tensor:
    """The same of queries (rows, tables), table by table: (rows, keys)."""
    count = torch.zeros(len(queries), keys.shape[1], dtype=torch.int16, device=keys.device)
    for table, buckets in enumerate(keys):
        count += queries[:, table, None] == buckets
    return count
