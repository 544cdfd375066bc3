"""What the scripts have in common: an option `--out`, and a page that says what made it."""

import argparse
import platform
import sys
from pathlib import Path


def parser(about: str | None) -> argparse.ArgumentParser:
    """Of a script with this docstring, whose first line is its help's; it has `--out`."""
    first_line = (about or "").partition("\n")[0]
    parser = argparse.ArgumentParser(_program(), description=first_line)
    parser.add_argument("--out", type=Path, help="write the page to this file as well")
    return parser


def publish(text: str, out: Path | None) -> None:
    """Print a page in Markdown, and write it where asked."""
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


def origin() -> str:
    """This command and the system that it runs on, for a page to begin with."""
    command = " ".join([_program(), *sys.argv[1:]])
    return (
        f"`{command}` on {platform.machine()}, {platform.system()}, "
        f"Python {platform.python_version()}"
    )


def _program() -> str:
    """What was typed before the options, `python -m benchmarks.speed.grid`."""
    spec = sys.modules["__main__"].__spec__  # of a module that was run by its name
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
