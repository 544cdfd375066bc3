"""The pages of documentation, and the blocks of code in them.

A block that no test can run says so in the line above it, `<!-- not run: why -->`; a page whose
commands take a real model, minutes or a cluster says so once, `<!-- commands not run: why -->`.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE = {"architectures.md", "costs.md", "does-replay-predict.md", "equal-bytes.md", "methods.md"}
"""Pages that a program writes."""
_FENCED = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S
)
_WHOLE = re.compile(r"^<!-- commands not run: (.+) -->$", re.M)
_INDENTED = re.compile(r"(?:^ {4}[^\n]*\n|^\n(?= {4}))+", re.M)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    language: str
    code: str
    why_not: str | None
    """Why no test runs it."""

    @property
    def file(self) -> str | None:
        """The file that it is, if its first line names one."""
        match = re.match(r"# ([\w/]+\.(?:py|yaml))\n", self.code)
        return None if match is None else match[1]

    def commands(self) -> Iterator[list[str]]:
        """The words of each command line; comments and output are none."""
        for line in self.lines():
            yield shlex.split(line, comments=True)

    def lines(self) -> Iterator[str]:
        """The command lines as they stand."""
        code = self.code.replace("\\\n", " ")
        if self.language == "console":
            code = "\n".join(re.findall(r"^\$ (.*)", code, re.M))
        elif self.language != "sh":
            return
        for line in code.splitlines():
            if line.strip() and not line.startswith("#"):
                yield from line.split(" && ")


def blocks(page: Path) -> Iterator[Block]:
    """All blocks of a page, in order: fenced ones, and indented ones that begin with a command."""
    text = page.read_text(encoding="utf-8")
    whole = _WHOLE.search(text)
    why = None if whole is None else whole[1]
    for match in _FENCED.finditer(text):
        yield Block(page.name, match["language"], match["code"], match["why"] or why)
    for match in _INDENTED.finditer(_FENCED.sub("", text)):
        code = "\n".join(line[4:] for line in match[0].splitlines()).strip()
        if code.startswith(("retrace ", "pip ", "python ")):
            yield Block(page.name, "sh", code, why)
