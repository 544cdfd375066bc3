"""The JSON schema of a plan's file, and whether a file keeps to it.

Only the words of JSON Schema (draft 2020-12) that `plan.schema.json` uses are known here.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
}
NAMED = {"object": "an object", "array": "a list", "string": "a text", "integer": "a whole number"}


@cache
def schema() -> dict[str, Any]:
    """The schema, as the package has it."""
    file = Path(__file__).with_name("plan.schema.json")
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return held


def mistake(content: Any) -> str | None:
    """The first thing that does not keep to the schema, with its place; None where all does.

    >>> mistake({"retrace_plan": 1, "layers": [{"layer": -1, "module": "a", "kv_heads": []}]})
    'layers[0].layer is -1: expected at least 0'
    """
    return next(_mistakes(content, schema(), ""), None)


def _mistakes(value: Any, rule: Mapping[str, Any], place: str) -> Iterator[str]:
    kind = rule.get("type")
    if kind is not None and (not isinstance(value, KINDS[kind]) or isinstance(value, bool)):
        yield f"{place or 'it'} is {_shown(value)}: expected {NAMED.get(kind, 'a number')}"
        return
    if "const" in rule and (value != rule["const"] or isinstance(value, bool)):
        yield f"{place} is {_shown(value)}: expected {rule['const']}"
    either = [one["required"][0] for one in rule.get("anyOf", ())]
    if either and not any(name in value for name in either):
        yield f"{place or 'it'} has no {' or '.join(either)}"
    for name in rule.get("required", ()):
        if name not in value:
            yield f"{place or 'it'} has no {name}"
    for word, wrong, words in (
        ("minimum", lambda least: value < least, "at least {}"),
        ("exclusiveMinimum", lambda least: not value > least, "more than {}"),
        ("maximum", lambda most: value > most, "at most {}"),
        ("minItems", lambda least: len(value) < least, "at least {} entry"),
        ("minLength", lambda least: len(value) < least, "at least {} character"),
    ):
        if word in rule and wrong(rule[word]):
            yield f"{place} is {_shown(value)}: expected {words.format(rule[word])}"
    for name, inner in rule.get("properties", {}).items():
        if name in value:
            yield from _mistakes(value[name], inner, f"{place}.{name}".lstrip("."))
    for i, one in enumerate(value if "items" in rule else ()):
        yield from _mistakes(one, rule["items"], f"{place}[{i}]")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."
