"""How many groups bound a query's k best keys, and how long its list of candidates is."""

import triton

MOST_RANKS = 1024
"""The largest budget whose candidates are sorted within one program."""
LEAST_TURNS = 7
LEAST_CAPACITY = 256
"""Where keys are alike, shorter lists overflow, and redoing those rows costs more than sorting."""


def turns_for(k: int, tile_keys: int) -> int:
    """Turns of tiles, each of which has as many groups as a tile has keys.

    Scores in no order are bounded within 1 + k / (2 groups) of k candidates: four groups a rank
    leave few too many. The number is odd, so that text that repeats after a power of 2 does not
    gather its like in one group.
    """
    return max(LEAST_TURNS, int(triton.next_power_of_2(4 * k)) // tile_keys - 1)


def capacity_for(k: int) -> int:
    """Length of a list of candidates for the k best, a power of 2."""
    return max(LEAST_CAPACITY, int(triton.next_power_of_2(k + k // 2 + 32)))
