"""The cache that a method runs on: formats of keys and values, by the names they have in specs."""

import math
import re
from dataclasses import dataclass
from typing import Self

from retrace.analyze.caches.floats import FP8, NVFP4
from retrace.analyze.caches.formats import Format
from retrace.analyze.caches.integers import Blocks, ByChannel, ByToken, KIVIKeys, KIVIValues
from retrace.analyze.caches.turboquant import TurboQuant
from retrace.traces import RetraceError

FORMATS = (
    "fp8, nvfp4, int8 or int4 with :32, :token or :channel, kivi:2, kivi:4, turboquant:B or "
    "turboquant-prod:B with B from 1 to 8"
)
_PAIR = re.compile(r"k:(?P<keys>[^+]*)\+v:(?P<values>[^+]*)")
_INTEGERS = re.compile(r"int(4|8):(32|token|channel)")
_KIVI = re.compile(r"kivi:(2|4)")
_TURBOQUANT = re.compile(r"turboquant(-prod)?:([1-8])")


@dataclass(frozen=True)
class Cache:
    """What cached keys and values are held in.

    Written by one name for both, such as `int4:32`, or `k:int4:32+v:fp8`. A method on such a cache
    builds its state of what the bits give back, scores and selects by it, and so is its output
    computed; what it is compared with is exact attention over the originals.
    """

    keys: Format
    values: Format

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `fp8` or `k:int4:32+v:fp8`.

        Raises:
            RetraceError: there is no such format.
        """
        if pair := _PAIR.fullmatch(text):
            return cls(_format(pair["keys"], text, True), _format(pair["values"], text, False))
        return cls(_format(text, text, True), _format(text, text, False))

    @property
    def step(self) -> int | None:
        """Queries at positions m * step to (m + 1) * step - 1 find the same keys rounded, and but
        for values that slide the same values; None where no token is ever held in full."""
        steps = [f.step for f in (self.keys, self.values) if f.step is not None]
        return math.gcd(*steps) if steps else None

    def __str__(self) -> str:
        keys, values = str(self.keys), str(self.values)
        return keys if keys == values else f"k:{keys}+v:{values}"


def _format(name: str, text: str, of_keys: bool) -> Format:
    if name in ("fp8", "nvfp4"):
        return FP8() if name == "fp8" else NVFP4()
    if match := _INTEGERS.fullmatch(name):
        kind = {"32": Blocks, "token": ByToken, "channel": ByChannel}[match[2]]
        return kind(int(match[1]))
    if match := _KIVI.fullmatch(name):
        return KIVIKeys(int(match[1])) if of_keys else KIVIValues(int(match[1]))
    if match := _TURBOQUANT.fullmatch(name):
        return TurboQuant(int(match[2]), match[1] is not None)
    raise RetraceError(
        f"cache={text!r}: expected {FORMATS}; or k:FORMAT+v:FORMAT where keys and values differ."
    )
