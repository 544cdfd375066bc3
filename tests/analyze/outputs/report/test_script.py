"""The page's one script holds every module, each where those that it imports stand before it."""

import re
from importlib.resources import files

from retrace.analyze.outputs.report.script import IMPORT, modules, script

DECLARED = re.compile(r"^(?:async function|function|const|let|class) (\w+)", re.MULTILINE)


def test_every_module_is_in_it() -> None:
    folder = files("retrace.analyze.outputs.report").joinpath("js")
    assert set(modules()) == {file.name for file in folder.iterdir()}


def test_modules_stand_after_those_that_they_import() -> None:
    order = list(modules())
    for name, text in modules().items():
        for imported in IMPORT.findall(text):
            assert order.index(imported) < order.index(name), f"{name} imports {imported}"


def test_nothing_is_imported_or_exported_any_more() -> None:
    assert not re.findall(r"^\s*(?:import|export)\b.*", script(), re.MULTILINE)


def test_no_two_modules_declare_the_same_name() -> None:
    names = DECLARED.findall(script())
    assert len(names) > 100
    assert sorted(set(names)) == sorted(names)
