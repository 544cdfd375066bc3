"""Which queries count: one set for all budgets of a run, so that more budget never looks worse
because it was judged on other queries; and which of their keys are told apart."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from retrace.analyze.units.protocol import Protocol
from retrace.traces import RetraceError

CONTEXT_PER_KEY = 10
"""A query counts for budget k from position `CONTEXT_PER_KEY` k on: a budget that holds most of
what there is to attend says nothing."""
EACH = "each"
"""Asks for that rule budget by budget, in place of the largest budget's for all."""


@dataclass(frozen=True)
class Counting:
    """Which queries of a sequence count."""

    protocol: Protocol
    least: int | None = None
    """The first position that counts, whatever the budget; with None each budget has the one that
    the rule gives it, and so queries of its own."""
    where: str | None = None
    """The phase or mark whose positions alone count; None for all."""
    evidence: str | None = None
    """The mark whose keys `evidence_recall` and its like are of; None where there is none."""

    @classmethod
    def asked(
        cls,
        protocol: str,
        least: int | str | None,
        where: str | None = None,
        evidence: str | None = None,
    ) -> Self:
        """Read `min_context` as it is asked for; None, like `EACH`, leaves each budget its own.

        Raises:
            RetraceError: it is neither a position nor `EACH`, the protocol is unknown, or it has
                whole blocks of queries and `where` parts them.
        """
        if isinstance(least, str) and least != EACH:
            raise RetraceError(f"min_context {least!r}: expected a position, or {EACH!r}.")
        if isinstance(least, int) and least < 0:
            raise RetraceError(f"min_context {least}: expected a position, 0 or more.")
        asked = Protocol.parse(protocol)
        if asked.block is not None and (least == EACH or (least or 0) % asked.block):
            raise RetraceError(
                f"min_context {least}: {asked} counts whole blocks of queries, expected a multiple "
                f"of {asked.block}."
            )
        if where is not None and asked.block is not None:
            raise RetraceError(
                f"--where {where}: {asked} counts whole blocks of queries, and a span may hold "
                "part of one: leave it out, or give another --protocol."
            )
        if least is None and asked.block is not None:
            least = 0  # the operations of a prefill are those of whole prompts
        return cls(asked, None if isinstance(least, str) else least, where, evidence)

    @classmethod
    def recorded(cls, facts: Mapping[str, Any]) -> Self:
        """Read back what `facts` says, from a file that anybody may have written.

        Raises:
            RetraceError: it says no such thing.
        """
        least = facts.get("min_context")
        if least is not None and type(least) is not int:
            raise RetraceError(f"min_context {least!r}: expected a position, 0 or more.")
        # Of earlier versions there are none.
        where, evidence = (facts.get(name) for name in ("where", "evidence"))
        for name in (where, evidence):
            if name is not None and not isinstance(name, str):
                raise RetraceError(f"{str(name)[:80]!r} is no name of a phase or mark.")
        return cls.asked(str(facts.get("protocol")), least, where, evidence)

    def for_all(self, budget: int) -> Self:
        """The same queries for all budgets: those that count for this one."""
        if self.protocol.block is not None:
            return self
        return replace(self, least=CONTEXT_PER_KEY * budget)

    @property
    def alike(self) -> bool:
        """Whether all budgets have the same queries."""
        return self.least is not None

    def first(self, k: int, length: int) -> int:
        """The first position of a sequence of this length that counts for budget k."""
        context = CONTEXT_PER_KEY * k if self.least is None else self.least
        return max(context, self.protocol.first_query(length))

    def facts(self) -> dict[str, Any]:
        """As `run.json` has it."""
        return {
            "protocol": str(self.protocol),
            "min_context": self.least,
            "where": self.where,
            "evidence": self.evidence,
        }

    def column(self) -> str:
        """As the column `min_context` of tables has it: `320`, or `320 in answer`.

        >>> Counting(Protocol(), 320, "answer").column(), Counting(Protocol()).column()
        ('320 in answer', '10k')
        """
        least = f"{CONTEXT_PER_KEY}k" if self.least is None else str(self.least)
        return least if self.where is None else f"{least} in {self.where}"

    def words(self) -> str:
        """Which queries count.

        >>> Counting(Protocol(), 500).words(), Counting(Protocol()).words()
        ('from position 500 on', 'from position 10 k on')
        >>> Counting(Protocol(), 320, "answer").words()
        'in answer, from position 320 on'
        """
        least = f"{CONTEXT_PER_KEY} k" if self.least is None else self.least
        inside = "" if self.where is None else f"in {self.where}, "
        return f"{inside}from position {least} on"


def number_of(least: int, most: int) -> str:
    """How many there are, in words.

    >>> number_of(1048, 1048), number_of(900, 1048)
    ('1,048', '900 to 1,048')
    """
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"
