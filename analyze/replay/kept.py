"""What of earlier runs stands in a folder, and whether that is still what their code gives."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from retrace.analyze.methods.specs import MethodSpec, is_loose, recorded_spec
from retrace.traces import RetraceError

log = logging.getLogger("retrace")

Made = Mapping[str, str | None]
"""Digests of what a method's figures come from, by what that is: its code, retrace's, what it
learnt from."""


def made_now(made: Made, topk: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder says of a method that is computed at a budget now, and said `before`."""
    earlier = before.get("when") if is_current(before, made) else None
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**made, "when": {**(earlier if isinstance(earlier, dict) else {}), str(topk): now}}


def when_made(entry: Mapping[str, Any], topk: int) -> str:
    """When a method was computed at a budget, as `made_now` noted it; empty if nothing says so."""
    times = entry.get("when")
    return str(times.get(str(topk), "")) if isinstance(times, dict) else ""


def is_current(entry: Mapping[str, Any], made: Made) -> bool:
    """Whether what a folder says of a method is what it would come from now. Earlier versions did
    not say."""
    return all(name in entry and entry[name] == digest for name, digest in made.items()) and (
        made.get("code") is not None
    )


def kept_words(points: Iterable[tuple[str, int, str]]) -> str:
    """Methods at budgets with the times that they are from, in a line.

    >>> kept_words([("quest", 10, "2026-11-30T08:00:00Z"), ("sparq", 10, "2026-11-30T09:00:00Z")])
    'quest, sparq at top-k 10 from 2026-11-30'
    """
    budgets: dict[tuple[str, str], list[int]] = {}
    for method, k, when in points:
        budgets.setdefault((method, when[:10]), []).append(k)
    alike: dict[tuple[str, str], list[str]] = {}
    for (method, day), ks in budgets.items():
        alike.setdefault((", ".join(map(str, sorted(ks))), day), []).append(method)
    return "; ".join(
        f"{', '.join(methods)} at top-k {ks} from {day}" for (ks, day), methods in alike.items()
    )


def note_kept(points: Iterable[tuple[str, int, str]]) -> None:
    """Say which methods and budgets are kept, and from when."""
    if words := kept_words(points):
        log.info("kept: %s (--again computes them again)", words)


def outdated_among(asked: Mapping[str, Made], known: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The methods asked for of which a folder has figures that would be others now; a warning names
    them, since they are computed again."""
    found = {name for name in asked if name in known and not is_current(known[name], asked[name])}
    if found:
        log.warning(
            "Computed again, since the code that their figures come from, or what they learn, "
            "changed: %s.",
            ", ".join(sorted(found)),
        )
    return found


def outdated_besides(
    asked: Sequence[MethodSpec],
    known: Mapping[str, Mapping[str, Any]],
    made_by: Callable[[MethodSpec], Made],
    engine: str,
) -> list[str]:
    """The methods of a folder, not asked for now, of which it has figures that would be others now;
    a warning names them. Files of methods are run only where they are named."""
    chosen, named = set(map(str, asked)), [spec.place for spec in asked]
    outdated, unseen = [], []
    for name, entry in known.items():
        if name in chosen:
            continue
        try:
            current = is_current(entry, made_by(recorded_spec(name, named)))
        except RetraceError:  # it is gone, of a file that is not named, or was given by a caller
            away = is_loose(name) or entry.get("given") is True
            current = away and entry.get("engine") == engine
            unseen += [name] if current else []
        if not current:
            outdated.append(name)
    if outdated:
        log.warning(
            "The folder holds figures of other code than there is now: %s. Name them with --method "
            "to compute them again.",
            ", ".join(outdated),
        )
    if unseen:
        log.info("not looked at, since their files are not named: %s", ", ".join(unseen))
    return outdated
