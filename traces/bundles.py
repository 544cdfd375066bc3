"""Bundles: consecutive short sequences that share their shards.

A trace of thousands of short sequences would else be tens of thousands of files, each larger on the
disk than what it holds. All arrays of a trace have the same bundles, which a reader learns from
their metadata: as many sequences as a shard or chunk has. The last bundle may have fewer.
"""

MOST_SEQUENCES = 2048
"""Sequences of a bundle at most, in any trace."""
BUNDLE_POSITIONS = 2048
"""Positions of a bundle of several sequences, padding included: an interrupted capture has no more
to do again than with one sequence of ordinary length."""
BUNDLE_BYTES = 1 << 28
"""Tensors of all layers of such a bundle, which are in memory together until they are written."""


def bundle_size(sequences: int, positions: int, sequence_bytes: int) -> int:
    """How many of a trace's `sequences` make a bundle: the largest power of two within the bounds
    above (batches mostly are one, too), or all where they are fewer; 1 for long ones.

    Args:
        sequences: how many there are.
        positions: of the longest.
        sequence_bytes: of one sequence's tensors of all layers.

    >>> [bundle_size(2000, positions, 8192) for positions in (16, 700, 1500)]
    [128, 2, 1]
    """
    most = min(BUNDLE_POSITIONS // positions, BUNDLE_BYTES // sequence_bytes, MOST_SEQUENCES)
    return min(sequences, 1 << (most.bit_length() - 1)) if most > 1 else 1


def bundles_of(sequences: int, size: int) -> list[range]:
    """The bundles of a trace, of `size` sequences each.

    >>> bundles_of(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, sequences)) for start in range(0, sequences, size)]
