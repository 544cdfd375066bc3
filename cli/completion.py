"""Completion in the shell: methods, and their parameters, where an option takes a spec."""

import os
from dataclasses import MISSING, Field
from importlib.metadata import entry_points
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, split_arg_string

BREAKS = (":", "=")
"""What bash takes for words of their own, and a spec has in its midst."""


def method_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The installed methods."""
    # The registry knows them too, and takes seconds to import.
    names = {point.name for point in entry_points(group="retrace.methods")}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def method_specs(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """How a spec may go on: the installed methods; after the colon, parameters with their defaults;
    after an equals sign, what can be chosen. Files, where it begins as a path does."""
    if incomplete.startswith((".", "/", "~")):
        return [CompletionItem(incomplete, type="file")]
    name, colon, given = incomplete.partition(":")
    if not colon:
        return method_names(ctx, param, incomplete)
    from retrace.analyze.methods.registry import method_class, parameter_fields
    from retrace.traces import RetraceError

    try:
        known = {field.name: field for field in parameter_fields(method_class(name))}
    except (RetraceError, ImportError):
        return []
    *earlier, last = given.split(",")
    before = incomplete.removesuffix(last)
    key, equals, value = last.partition("=")
    if equals:
        choices = known[key].metadata.get("choices", ()) if key in known else ()
        return [CompletionItem(f"{before}{key}={c}") for c in choices if c.startswith(value)]
    taken = {part.partition("=")[0] for part in earlier}
    return [
        CompletionItem(f"{before}{name}={_default(field)}", help=field.metadata.get("help"))
        for name, field in known.items()
        if name.startswith(key) and name not in taken
    ]


def _default(parameter: Field[Any]) -> str:
    """A parameter's default as a spec has it; nothing where there is none."""
    return "" if parameter.default is MISSING else str(parameter.default)


class Bash(BashComplete):
    """Bash hands over `quest:page=8` as five words, and replaces the last of them."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one at the cursor, and that one, as they were typed."""
        words = split_arg_string(os.environ["COMP_WORDS"])[: int(os.environ["COMP_CWORD"]) + 1]
        if len(words) <= int(os.environ["COMP_CWORD"]):
            words.append("")
        typed: list[str] = []
        for place, word in enumerate(words):
            breaks = word in BREAKS or (word and words[place - 1] in BREAKS)
            if breaks and typed:
                typed[-1] += word
            else:
                typed.append(word)
        return typed[1:-1], typed[-1]

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """What may stand in place of the part of the word after its last break."""
        items = super().get_completions(args, incomplete)
        spec = incomplete.partition("=")[2] if incomplete.startswith("--") else incomplete
        kept = 1 + max(spec.rfind(mark) for mark in BREAKS)
        for item in items:
            if item.type == "plain":
                item.value = item.value[kept:]
        return items
