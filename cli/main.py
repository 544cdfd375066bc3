"""`retrace`: the group of commands, each loaded when it is named."""

import importlib

import click
from click.shell_completion import add_completion_class

from retrace.cli.completion import Bash

add_completion_class(Bash)

COMMANDS = (
    "capture",
    "analyze",
    "sweep",
    "merge",
    "recommend",
    "plan",
    "compare",
    "evaluate",
    "calibrate",
    "show",
    "report",
    "export",
    "copy",
    "info",
    "verify",
    "traces",
    "methods",
)
"""A module of `retrace.cli.commands` each, in the order in which they are needed."""


class Commands(click.Group):
    """Loads a command's module by its name, and answers a misspelt one with those that are near."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"retrace.cli.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name, and the arguments left for it."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from retrace.traces.errors import did_you_mean

            guess = did_you_mean(name, COMMANDS)
            raise click.UsageError(
                f"There is no command {name!r}.{guess} Commands: {', '.join(COMMANDS)}.", ctx
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "RETRACE",
        # --batch_size is --batch-size.
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
    epilog="""\b
Example:
  retrace capture --pretrained EleutherAI/pythia-70m --tasks wikitext --limit 10
  retrace analyze --method exact --method quest --topk 10,50""",
)
@click.version_option(package_name="retrace-attention", message="%(prog)s %(version)s")
def main() -> None:
    """Capture a language model's queries, keys and values once; replay retrieval-based attention
    methods against them offline."""
