"""Help pages: complete, and quick because they load nothing heavy."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
from click.testing import Result

from retrace.cli.commands.capture import setting_docs
from retrace.cli.main import COMMANDS

Run = Callable[..., Result]
HEAVY = ("torch", "transformers", "datasets", "zarr", "pandas", "matplotlib", "numpy", "rich")
SCRIPT = """
import sys, time
sys.argv[0] = "retrace"
from retrace.cli.main import main
try:
    main()
except SystemExit as exit:
    code = exit.code
print(code, time.process_time(), *(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_quick(command: str | None) -> None:
    arguments = ["--help"] if command is None else [command, "--help"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "  Example:\n    retrace" in done.stdout
    code, seconds, *heavy = done.stderr.split()
    assert code == "0"
    assert not heavy
    assert float(seconds) < 0.5  # of processor time, whatever else the machine does


def test_every_setting_of_capture_is_an_option(run: Run) -> None:
    from dataclasses import fields

    from retrace.capture import CaptureSettings

    assert list(setting_docs()) == [field.name for field in fields(CaptureSettings)]
    page = run("capture", "--help").stdout
    for field in fields(CaptureSettings):
        assert f"--{field.name.replace('_', '-')}" in page
        assert " ".join(setting_docs()[field.name].split()[:3]) in page


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
