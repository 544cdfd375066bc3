"""The script of a page: the modules in `js`, joined into one.

A page is one file, and its policy lets the browser run what has one of two digests, so no module
can import another. Joined, they share one scope, and a browser refuses a name that two of them
declare.
"""

import re
from functools import cache
from importlib.resources import files

FIRST = "page.js"
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z]+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async function|function|const|let|class) )", re.MULTILINE)


@cache
def script() -> str:
    """All modules, each after those that it imports, as text of one module that imports none."""
    return "\n".join(EXPORT.sub("", IMPORT.sub("", text)) for text in modules().values())


def modules() -> dict[str, str]:
    """The text of each module by its file's name, those that it imports before it."""
    folder = files("retrace.analyze.outputs.report").joinpath("js")
    found: dict[str, str] = {}

    def add(name: str) -> None:
        text = folder.joinpath(name).read_text(encoding="utf-8")
        for imported in IMPORT.findall(text):
            if imported not in found:
                add(imported)
        found[name] = text

    add(FIRST)
    return found
