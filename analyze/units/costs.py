"""What bytes are counted in, and what is said wherever they stand.

Bytes are those that one query's group of heads reads of its own sequence's cache and of what the
method keeps beside it. What is learned, drawn or fitted to turn a query into what the method
compares (projections, networks, hyperplanes, chosen channels) is read by each query too, and
charged: a server that decodes several sequences at once reads what they share once for all of them,
and comes to less. Single numbers, such as a threshold, are not.

Of a cache in few bits, keys and values that are read of it take what its format does, and what the
method keeps beside it still what the method says; ratios are over a cache in full.

Latent attention caches one vector of a token in place of the keys and values of all heads
(`cached_bytes` of a layer's rules). Of such a layer the distinct tokens that any of its heads
attends are counted, times that, and beside them what every head reads of its index: an index holds
the keys that it was built from, expanded. A method that reads all keys to rank them reads the whole
cache once, for all heads.
"""

from collections.abc import Mapping
from typing import Any

SERVING_DTYPE = "bfloat16"
"""What caches are served in, whatever a trace holds: ratios would follow the trace's dtype."""
SERVING_ITEMSIZE = 2
"""Bytes of one element."""
NOT_CHARGED = "index not charged"


def serving_words(run: Mapping[str, Any]) -> str:
    """What the bytes of a run are those of. Earlier versions counted in the trace's own dtype, and
    no projections."""
    if "serving_dtype" in run:
        return f"of a cache in {run['serving_dtype']}"
    return f"of a cache in the trace's {run.get('dtype', 'dtype')}, without projections"


def is_charged(run: Mapping[str, Any], method: str) -> bool:
    """Whether a method of a run's facts says what its index costs. Earlier versions did not ask: of
    a file of one's own, which they name by a digest, it is not known."""
    facts = run.get("methods", {}).get(method, {})
    return bool(facts.get("charged", facts.get("source_digest") is None))


def with_charge(run: Mapping[str, Any], method: str, named: str | None = None) -> str:
    """A method as it is `named` where bytes stand, by its spec if that is not said."""
    words = method if named is None else named
    return words if is_charged(run, method) else f"{words} ({NOT_CHARGED})"
