"""What is installed is what the repository holds: build tools leave folders out without a word."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("capture", "analyze", "cli", "traces", "testing")

pytest.importorskip("build", reason="needs the dev extra")
pytest.importorskip("hatchling", reason="needs the dev extra")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, with no network."""
    out = tmp_path_factory.mktemp("dist")
    # Without --wheel or --sdist, `build` makes the wheel from the sdist that it made.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    [sdist] = out.glob("*.tar.gz")
    [wheel] = out.glob("*.whl")
    assert sdist.name.startswith("retrace_attention-")
    return wheel


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    wanted = {
        f"retrace/{file.relative_to(ROOT)}"
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == wanted
    assert {name.split("/")[0] for name in held} == {"retrace"}  # and no top-level `cli`
    # `retrace` is a namespace package, which an __init__ would end.
    assert "retrace/__init__.py" not in held


def test_every_package_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", target, wheel],
        check=True,
    )  # fmt: skip
    script = (
        "import importlib, sys\n"
        f"for name in {PACKAGES!r}:\n"
        "    module = importlib.import_module(f'retrace.{name}')\n"
        "    assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
        "from retrace.cli.main import main\n"
        "from retrace.analyze import method_names, method_class\n"
        "for name in method_names(): method_class(name)\n"
        # -c looks for modules in the current folder, where no `cli` may be.
        "assert not importlib.util.find_spec('cli')\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(target)],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": ""},
    )
