"""Imports run one way, cli -> capture -> analyze -> traces (and testing -> analyze), and nowhere
in a circle; those for types and those within functions count as well."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("traces", "analyze", "testing", "capture", "cli")
"""From the ground up."""


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for top in FLOORS for file in (ROOT / top).rglob("*.py")}


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            own = name.removeprefix("retrace.")
            while own != name and own not in MODULES and "." in own:
                own = own.rpartition(".")[0]
            if own in MODULES:
                yield own


IMPORTS = {module: {*imported(file)} - {module} for module, file in MODULES.items()}


def test_there_are_some() -> None:
    assert len(MODULES) > 200
    assert "analyze.replay.engine" in IMPORTS["analyze.replay.tasks"]


def test_no_floor_imports_one_above() -> None:
    def floor(module: str) -> int:
        return FLOORS.index(module.partition(".")[0])

    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if floor(other) > floor(module)
    ]
    assert not wrong


def test_no_circle_of_modules() -> None:
    # It raises CycleError, which names one.
    assert len([*TopologicalSorter(IMPORTS).static_order()]) == len(MODULES)
