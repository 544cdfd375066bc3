"""How whoever works for long tells how far it is."""

from collections.abc import Callable

ShowDone = Callable[[int, int], None]
"""Told how many are done, and of how many."""
ShowStage = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""
