"""A plan in the place of a method: what it is like is what the methods of its kv heads are like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from retrace.analyze.methods.base import Method
from retrace.analyze.plans.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Planned(Method):
    """Each kv head has its own method and budget. It is never asked itself: wherever a kv head is
    looked at, its own method is."""

    source: ClassVar[str] = "plan"

    plan: Plan
    methods: Mapping[str, Method] = field(default_factory=dict, repr=False)
    """Those of its kv heads, by spec."""

    @property
    def calibrated(self) -> bool:
        """Whether any of them learns."""
        return any(method.calibrated for method in self.methods.values())

    @property
    def across_layers(self) -> bool:  # type: ignore[override]
        """Whether any of them reads other layers."""
        return any(method.across_layers for method in self.methods.values())

    @property
    def in_turn(self) -> bool:  # type: ignore[override]
        """Whether any of them answers queries by those before them."""
        return any(method.in_turn for method in self.methods.values())

    @property
    def charged(self) -> bool:
        """Whether all of them say what finding their keys reads."""
        return all(method.charged for method in self.methods.values())
