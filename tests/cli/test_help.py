"""Help pages: complete, and quick, because they load nothing heavy."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
from click.testing import Result

from retrace.cli.documented import field_docs
from retrace.cli.main import COMMANDS

Run = Callable[..., Result]
HEAVY = ("torch", "transformers", "datasets", "zarr", "pandas", "matplotlib", "numpy", "rich")
SCRIPT = """
import sys
sys.argv[0] = "retrace"
from retrace.cli.main import main
try:
    main()
except SystemExit as exit:
    code = exit.code
print(code, *(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_nothing_heavy(command: str | None) -> None:
    arguments = ["--help"] if command is None else [command, "--help"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "  Example:\n    retrace" in done.stdout
    code, *heavy = done.stderr.split()
    assert code == "0"
    assert not heavy


def test_every_setting_of_capture_is_an_option(run: Run) -> None:
    from dataclasses import fields

    from retrace.capture import CaptureSettings

    docs = field_docs("retrace.capture", "settings.py")
    names = [field.name for field in fields(CaptureSettings)]
    assert [name for of, name in docs if of == "CaptureSettings"] == names
    page = run("capture", "--help").stdout
    for name in names:
        assert f"--{name.replace('_', '-')}" in page
        assert " ".join(docs["CaptureSettings", name].split()[:3]) in page


def test_every_option_of_analysis_is_one_of_the_command(run: Run) -> None:
    from retrace.analyze.options import DEFAULTS, RunOptions
    from retrace.cli.commands.analyze import command

    assert [*DEFAULTS] == [*RunOptions.__annotations__]
    docs = field_docs("retrace.analyze", "options.py")
    known = {parameter.name for parameter in command.params} | {"keep_exact"}  # --no-cache
    assert {name for _, name in docs} == {*DEFAULTS} <= known
    page = " ".join(run("analyze", "--help").stdout.split())
    for (_, name), doc in docs.items():
        assert name == "keep_exact" or " ".join(doc.split()[:4]) in page


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retrace.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"retrace {version('retrace-attention')}\n"


def test_a_misspelt_command_gets_the_nearest(run: Run) -> None:
    result = run("analyse", code=2)
    assert "no command 'analyse'. Did you mean analyze?" in result.stderr
    assert not result.stdout
