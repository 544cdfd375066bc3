"""What is said wherever bytes stand: what is not charged."""

from collections.abc import Mapping
from typing import Any

NOT_CHARGED = "index not charged"


def is_charged(run: Mapping[str, Any], method: str) -> bool:
    """Whether a method of a run's facts says what its index costs. Earlier versions did not ask: of
    a file of one's own, which they name by a digest, it is not known."""
    facts = run.get("methods", {}).get(method, {})
    return bool(facts.get("charged", facts.get("source_digest") is None))


def with_charge(run: Mapping[str, Any], method: str, named: str | None = None) -> str:
    """A method as it is `named` where bytes stand, by its spec if that is not said."""
    words = method if named is None else named
    return words if is_charged(run, method) else f"{words} ({NOT_CHARGED})"
