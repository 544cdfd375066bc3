"""Options that are explained by the docstrings of what they set."""

import ast
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@cache
def field_docs(package: str, file: str) -> dict[tuple[str, str], str]:
    """The docstrings of all fields of a file's classes, by class and field, read from its source:
    to import it takes longer than a help page may."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations
    source = Path(found.submodule_search_locations[0], file).read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {(c.name, field): doc for c in classes for field, doc in _fields(c)}


def _fields(settings: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(settings.body, settings.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            yield field.target.id, " ".join(str(ast.literal_eval(below.value)).split())


def documented(
    package: str, file: str, *classes: str
) -> Callable[..., Callable[[Decorated], Decorated]]:
    """What makes an option that sets a field of one of these classes, and is explained by it."""

    def option(
        *flags: str, sets: str | None = None, **options: Any
    ) -> Callable[[Decorated], Decorated]:
        """An option that sets the field of its name, or the one that is named."""
        name = sets or flags[0].removeprefix("--").replace("-", "_")
        docs = field_docs(package, file)
        help = options.pop("help", None) or next(
            docs[c, name] for c in classes if (c, name) in docs
        )
        return click.option(*flags, name, help=help, **options)

    return option
