"""`retrace methods`: the methods that can be replayed, and their parameters."""

import importlib.util
import inspect
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import Command
from retrace.cli.parameters import FORMAT
from retrace.cli.screen import print_facts, print_json, print_table

if TYPE_CHECKING:
    from retrace.analyze import Method


@click.command(
    "methods",
    cls=Command,
    epilog="""\b
Example:
  retrace methods
  retrace methods quest""",
)
@click.argument("name", required=False)
@FORMAT
def command(name: str | None, format: str) -> None:
    """List the methods that `retrace analyze --method` takes, or print all about the one NAME."""
    from retrace.analyze import method_class, method_names

    if name is None:
        found = [describe(known, method_class(known)) for known in method_names()]
        if format == "json":
            print_json(found)
            return
        print_table(
            ["Method", "Level", "What it does", "Needs"],
            [[one["name"], one["level"], one["summary"], _needs(one)] for one in found],
            left=("Level", "What it does", "Needs"),
        )
        return
    facts = describe(name, _class(name))
    if format == "json":
        print_json(facts)
    else:
        _print(facts)


def describe(name: str, method: type["Method"]) -> dict[str, Any]:
    """What there is to know of a method before it is replayed."""
    from retrace.analyze.methods.registry import parameter_fields

    summary, _, details = (inspect.getdoc(method) or "").partition("\n\n")
    cost = method.__dict__.get("aux_bytes")
    return {
        "name": name,
        "level": _level(method),
        "summary": " ".join(summary.split()),
        "details": details,
        "source": method.source,
        "fitted": method.fitted,
        "reads": inspect.getdoc(cost) if cost is not None else None,
        "extra": method.extra,
        "installed": method.extra is None or importlib.util.find_spec(method.extra) is not None,
        "parameters": [
            {
                "name": field.name,
                "default": None if field.default is MISSING else _plain(field.default),
                "required": field.default is MISSING,
                "help": field.metadata.get("help", ""),
                "choices": list(field.metadata.get("choices", ())),
            }
            for field in parameter_fields(method)
        ],
    }


def _class(name: str) -> type["Method"]:
    from retrace.analyze import method_class, parse_spec

    # A method in a loose file is known by its spec only.
    return type(parse_spec(name).method) if ".py:" in name else method_class(name)


def _level(method: type["Method"]) -> str:
    from retrace.analyze import AttendMethod, ScoreMethod, SearchMethod

    levels = {"score": ScoreMethod, "search": SearchMethod, "attend": AttendMethod}
    return next((level for level, base in levels.items() if issubclass(method, base)), "")


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def _needs(facts: dict[str, Any]) -> str:
    if facts["extra"] is None:
        return ""
    return str(facts["extra"]) + ("" if facts["installed"] else " (not installed)")


def _print(facts: dict[str, Any]) -> None:
    lines = [
        ("Method", facts["name"]),
        ("Level", facts["level"]),
        ("Source", facts["source"]),
        ("State", "fitted to earlier keys" if facts["fitted"] else "one quantity per key"),
        ("Reads", facts["reads"] or "nothing but the selected keys and values"),
    ]
    if facts["extra"] is not None:
        install = f"pip install 'retrace-attention[{facts['extra']}]'"
        lines.append(("Needs", facts["extra"] if facts["installed"] else f"{install} (missing)"))
    click.echo(facts["summary"])
    if facts["details"]:
        click.echo(f"\n{facts['details']}")
    click.echo()
    print_facts(lines)
    if facts["parameters"]:
        print_table(
            ["Parameter", "Default", "What it is"],
            [
                [
                    one["name"],
                    "(required)" if one["required"] else str(one["default"]),
                    one["help"] + (f" ({', '.join(one['choices'])})" if one["choices"] else ""),
                ]
                for one in facts["parameters"]
            ],
            left=("Default", "What it is"),
        )
