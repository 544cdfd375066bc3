"""What there is to know of a method before it is replayed, and the page of all methods."""

import inspect
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

from retrace.analyze.methods.base import (
    AttendMethod,
    BlockMethod,
    EvictionMethod,
    Method,
    PolicyMethod,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.methods.registry import method_names, parameter_fields
from retrace.analyze.methods.specs import parse_spec

LEVELS = {
    "evict": EvictionMethod,
    "score": ScoreMethod,
    "search": SearchMethod,
    "attend": AttendMethod,
    "block": BlockMethod,
    "policy": PolicyMethod,
}
"""By name, the more special first."""
LEVEL_WORDS = {
    "evict": "keeps some keys for good and drops the others",
    "score": "scores keys or pages, of which the best are attended",
    "search": "asks an index for the best keys",
    "attend": "changes the output itself",
    "block": "chooses keys for whole blocks of queries, in prefill",
    "policy": "leaves each kv head to another method",
}
"""What methods of a level do."""
SHARED = ("cache", "pool", "keep", "budget", "output")
"""Parameters that mean the same wherever they are found."""
LOOKS = {
    "block": "the queries of each block",
    "end": "the queries of each block, and the prompt's or chunk's last",
}
"""What a method of prefill looks at to choose keys for a block of queries."""
HEADER = """\
# Methods

Made by `retrace methods --format markdown`. Every parameter can be set in a spec, such as
`quest:page=32,pool=sum-softmax`. A method's own defaults are those of its source.

Bytes are those of a cache in bfloat16, whatever a trace holds, or of what `cache` names, as one
query's heads read them of their own sequence: selected keys and values, and what each method below
says that it reads to find them. What turns a query into what is compared (projections, networks,
hyperplanes, chosen channels) is counted with each query; a server that decodes several sequences at
once reads it once for all of them. Single numbers are not counted.
[equal-bytes.md](equal-bytes.md) compares them all where they read as much.
"""


def describe(name: str, method: Method) -> dict[str, Any]:
    """A method's facts by name, as JSON has them: level, summary, details, source, state, reads,
    looks_at, extra, install, installed, and its parameters with defaults and help."""
    kind = type(method)
    summary, _, details = (inspect.getdoc(kind) or "").partition("\n\n")
    return {
        "name": name,
        "level": next((level for level, base in LEVELS.items() if isinstance(method, base)), ""),
        "summary": " ".join(summary.split()),
        "details": details,
        "source": method.source,
        "fitted": method.fitted,
        "calibrated": method.calibrated,
        "reads": _reads(method),
        "looks_at": LOOKS[method.looks] if isinstance(method, BlockMethod) else None,
        "extra": method.extra,
        "install": method.install_command(),
        "installed": method.is_installed(),
        "parameters": [
            {
                "name": field.name,
                "default": None if field.default is MISSING else _plain(field.default),
                "required": field.default is MISSING,
                "help": field.metadata.get("help", ""),
                "choices": list(field.metadata.get("choices", ())),
            }
            for field in parameter_fields(kind)
        ],
    }


def _reads(method: Method) -> str | None:
    """What a method reads to find keys; None if nothing."""
    if not method.charged:
        return "what it does not say"
    if type(method).aux_bytes_at is not Method.aux_bytes_at:
        return inspect.getdoc(type(method).aux_bytes_at)
    if type(method).aux_bytes is not Method.aux_bytes:
        return inspect.getdoc(type(method).aux_bytes)
    return "All keys, which are read to rank them." if method.reads_all_keys else None


def state_words(facts: dict[str, Any]) -> str:
    """What a method's state is made from."""
    if facts["calibrated"]:
        return "learnt from other sequences of the trace"
    return "fitted to earlier keys" if facts["fitted"] else "one quantity per key"


def families(found: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Methods' facts by their level and what their state is made from, in the order of `LEVELS`."""
    states = ["one quantity per key", "fitted to earlier keys"]
    states += [state for state in map(state_words, found) if state not in states]
    groups = {
        (level, state): [
            one for one in found if one["level"] == level and state_words(one) == state
        ]
        for level in dict.fromkeys([*LEVELS, *(one["level"] for one in found)])
        for state in dict.fromkeys(states)
    }
    return {family: members for family, members in groups.items() if members}


def page() -> str:
    """All installed methods, in Markdown: what they share once, an index, and each by itself."""
    found = [describe(name, parse_spec(name).method) for name in method_names()]
    return "\n".join([HEADER, _shared(found), _index(found), *map(_section, found)])


def _shared(found: Sequence[dict[str, Any]]) -> str:
    """The parameters that methods share, as a table."""
    lines = [
        "## Shared parameters",
        "",
        "These mean the same in every method of the levels named. Each method lists its own "
        "defaults of them ([caches.md](caches.md) has all formats of `cache`).",
        "",
        "| Parameter | Levels | What it is |",
        "| --- | --- | --- |",
    ]
    for name in SHARED:
        holders = [(one, p) for one in found for p in one["parameters"] if p["name"] == name]
        levels = [level for level in LEVELS if any(one["level"] == level for one, _ in holders)]
        lines.append(f"| `{name}` | {', '.join(levels)} | {_help(holders[0][1])} |")
    return "\n".join(lines) + "\n"


def _index(found: Sequence[dict[str, Any]]) -> str:
    """The names of all methods by family, as a table."""
    lines = ["## By family", "", "| Level | State | Methods |", "| --- | --- | --- |"]
    for (level, state), members in families(found).items():
        names = ", ".join(f"[{one['name']}](#{one['name']})" for one in members)
        lines.append(f"| {level}: {LEVEL_WORDS.get(level, '')} | {state} | {names} |")
    return "\n".join(lines) + "\n"


def _help(parameter: dict[str, Any]) -> str:
    choices = f" ({', '.join(parameter['choices'])})" if parameter["choices"] else ""
    return f"{parameter['help']}{choices}"


def _section(facts: dict[str, Any]) -> str:
    lines = [f"## {facts['name']}\n", facts["summary"], ""]
    if facts["details"]:
        lines += [facts["details"], ""]
    lines += [
        f"- Source: {facts['source']}",
        f"- Level: {facts['level']}",
        f"- State: {state_words(facts)}",
        f"- Reads: {facts['reads'] or 'nothing but the selected keys and values'}",
    ]
    if facts["looks_at"]:
        lines.append(f"- Looks at: {facts['looks_at']}")
    if facts["extra"]:
        lines.append(f"- Needs: `{facts['install']}`")
    shared = [p for p in facts["parameters"] if p["name"] in SHARED]
    own = [p for p in facts["parameters"] if p["name"] not in SHARED]
    if shared:
        defaults = ", ".join(
            f"`{p['name']}={'none' if p['default'] is None else p['default']}`" for p in shared
        )
        lines.append(f"- Shared parameters: {defaults}")
    if own:
        lines += ["", "| Parameter | Default | What it is |", "| --- | --- | --- |"]
    for one in own:
        default = "(required)" if one["required"] else f"`{one['default']}`"
        lines.append(f"| `{one['name']}` | {default} | {_help(one)} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)
