"""`retrace methods`: the methods that can be replayed, and their parameters."""

from typing import Any

import click

from retrace.cli.command import Command
from retrace.cli.completion import method_names
from retrace.cli.screen import print_facts, print_json, print_table, print_words

WIDEST = 120
"""Columns of the list, however wide the terminal."""


@click.command(
    "methods",
    cls=Command,
    epilog="""\b
Example:
  retrace methods
  retrace methods quest""",
)
@click.argument("name", required=False, shell_complete=method_names)
@click.option(
    "--format",
    type=click.Choice(["table", "json", "markdown"]),
    default="table",
    show_default=True,
    help="What to print on stdout; markdown is the page of all methods.",
)
def command(name: str | None, format: str) -> None:
    """List the methods that `retrace analyze --method` takes, or print all about the one NAME."""
    from retrace.analyze import method_names, parse_spec
    from retrace.analyze.methods.describe import LEVEL_WORDS, describe, families, page

    if name is not None:
        facts = describe(name, parse_spec(name).method)
        if format == "json":
            print_json(facts)
        else:
            _print(facts)
        return
    if format == "markdown":
        click.echo(page(), nl=False)
        return
    found = [describe(known, parse_spec(known).method) for known in method_names()]
    if format == "json":
        print_json(found)
        return
    for (level, state), members in families(found).items():
        print_table(
            ["Method", "What it does", "Needs"],
            [[one["name"], one["summary"], _needs(one)] for one in members],
            title=f"{level}: {LEVEL_WORDS.get(level, '')}; {state}",
            left=("What it does", "Needs"),
            widest=WIDEST,
        )


def _needs(facts: dict[str, Any]) -> str:
    if facts["extra"] is None:
        return ""
    return str(facts["extra"]) + ("" if facts["installed"] else " (not installed)")


def _print(facts: dict[str, Any]) -> None:
    from retrace.analyze.methods.describe import state_words

    lines = [
        ("Method", facts["name"]),
        ("Level", facts["level"]),
        ("Source", facts["source"]),
        ("State", state_words(facts)),
        ("Reads", facts["reads"] or "nothing but the selected keys and values"),
    ]
    if facts["looks_at"] is not None:
        lines.append(("Looks at", facts["looks_at"]))
    if facts["extra"] is not None:
        missing = f"{facts['install']} (missing)"
        lines.append(("Needs", facts["extra"] if facts["installed"] else missing))
    print_words("\n\n".join(filter(None, (facts["summary"], facts["details"]))))
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
