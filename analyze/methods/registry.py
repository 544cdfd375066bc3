"""From a method spec to a method: `quest`, `quest:page=32,pool=sum`, `./mine.py:Mine:a=1`."""

import hashlib
import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from difflib import get_close_matches
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from retrace.analyze.budget import Budget
from retrace.analyze.keep import Keep
from retrace.analyze.methods.base import Method
from retrace.analyze.methods.function import Function
from retrace.analyze.provenance import LOOSE, Code, code_of_method
from retrace.traces import RetraceError

ENTRY_POINTS = "retrace.methods"
ALL = "all"
"""In place of a spec: every installed method."""
MOST_SPECS = 1000
"""Of one run: more are a slip of the finger, or a file that was made to fill the memory."""
MOST_NUMBER = 2**31
"""Whole numbers of a spec are below this: none stands for more positions or channels."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_LOOSE = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)(?::(?P<parameters>.*))?")


class MethodSpec:
    """A method by the name it is known by, with its parameters.

    It is pickled as text: another process loads the method, and its file, anew.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        file: Path | None = None,
    ) -> None:
        self.name = name
        self.method = method
        self.file = file
        """The loose file that the method comes from."""

    @cached_property
    def code(self) -> Code:
        """The code that the method is, when it was first looked at."""
        return code_of_method(self.method)

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter with its value, as text or number."""
        return {
            f.name: str(value) if isinstance(value, Keep | Budget) else value
            for f in parameter_fields(type(self.method))
            for value in (getattr(self.method, f.name),)
        }

    def __str__(self) -> str:
        """The shortest spec that gives this method: parameters at their default are left out."""
        changed = [
            f"{f.name}={self.parameters[f.name]}"
            for f in parameter_fields(type(self.method))
            if getattr(self.method, f.name) != f.default
        ]
        return ":".join([self.name, *([",".join(changed)] if changed else [])])

    @property
    def place(self) -> str:
        """The spec that gives this method wherever it is read: with the loose file's whole path."""
        return str(self) if self.file is None else f"{self.file.parent}/{self}"

    def anew(self) -> Method:
        """The method as it is before anything was asked of it: of a loose file, by loading it
        again."""
        return replace(self.method) if self.file is None else parse_spec(self.place).method

    def __reduce__(self) -> tuple[Any, ...]:
        return same_spec, (self.place, self.code.sources_digest)


def parse_spec(text: str) -> MethodSpec:
    """The method that a spec names.

    Raises:
        RetraceError: no such method or parameter (with the nearest name), or a bad value.
    """
    if loose := _LOOSE.fullmatch(text):
        return _loose_method(Path(loose["path"]), loose["name"], loose["parameters"] or "")
    name, _, parameters = text.partition(":")
    return MethodSpec(name, _make(method_class(name), name, _read_parameters(parameters, name)))


def is_loose(text: str) -> bool:
    """Whether a spec names a method of a loose file."""
    return _LOOSE.fullmatch(text) is not None


def recorded_spec(text: str, named: Sequence[str]) -> MethodSpec:
    """The method that a trace or the parts of a run name.

    Those are data that anybody may have written: a loose file that they name is run only if the
    user named it too.

    Args:
        text: the spec.
        named: specs of loose files, as the user gave them; their parameters do not matter.

    Raises:
        RetraceError: what `parse_spec` raises, or a file that the user did not name.
    """
    recorded = _LOOSE.fullmatch(text)
    if recorded is None:
        return parse_spec(text)
    file, name = Path(recorded["path"]).name, recorded["name"]
    for loose in filter(None, map(_LOOSE.fullmatch, named)):
        path = Path(loose["path"])
        if (path.name, loose["name"]) == (file, name):
            return _loose_method(path, name, recorded["parameters"] or "")
    raise RetraceError(
        f"The method {file}:{name} is code of a file, which is run only where you name it: add "
        f"--method PATH/{file}:{name}."
    )


@cache
def same_spec(text: str, sources_digest: str) -> MethodSpec:
    """The method that a spec named before, in another process.

    Raises:
        RetraceError: a file of its code is gone or is another here.
    """
    spec = parse_spec(text)
    if spec.code.sources_digest != sources_digest:
        raise RetraceError(
            f"The code of {spec}, or what it imports, was edited since the run began, or is "
            "another on this worker: run it again."
        )
    return spec


def parse_specs(texts: Sequence[str]) -> tuple[list[MethodSpec], frozenset[str]]:
    """The methods that specs name, each once, and which of them `all` stands for alone.

    `quest:page={8,16}` stands for one method with each value, several braces for each combination.
    `all` is every installed method with its defaults, less those whose library is missing.

    Raises:
        RetraceError: no method at all, more than `MOST_SPECS`, or two different files with a method
            of one name.
    """
    grids = [_grid(text) for text in texts if text != ALL]
    count = sum(math.prod(map(len, values)) for _, values in grids)
    if count > MOST_SPECS:
        raise RetraceError(
            f"The methods have {count:,} combinations of values; a run takes {MOST_SPECS:,}."
        )
    named = [parse_spec(one) for between, values in grids for one in _filled(between, values)]
    every = _every_method() if ALL in texts else []
    if not named and not every:
        raise RetraceError("No method is named; `retrace methods` lists them.")
    unique: dict[str, MethodSpec] = {}
    for spec in [*named, *every]:
        first = unique.setdefault(str(spec), spec)
        if first is not spec and first.code != spec.code:
            raise RetraceError(f"Two different files have a method {spec}: rename one of them.")
    return list(unique.values()), frozenset(map(str, every)) - frozenset(map(str, named))


def _grid(text: str) -> tuple[list[str], list[list[str]]]:
    """A spec's text between braces, and the values in each."""
    split = _BRACES.split(text)
    between = split[::2]
    if any(mark in part for part in between for mark in "{}"):
        raise RetraceError(f"{text!r}: expected values in braces such as quest:page={{8,16,32}}.")
    return between, [[value.strip() for value in listed.split(",")] for listed in split[1::2]]


def _filled(between: list[str], values: list[list[str]]) -> list[str]:
    """A spec for each combination of the values."""
    return [
        between[0] + "".join(map("".join, zip(chosen, between[1:], strict=True)))
        for chosen in itertools.product(*values)
    ]


def _every_method() -> list[MethodSpec]:
    kinds = {name: method_class(name) for name in method_names()}
    return [
        parse_spec(name)
        for name, kind in kinds.items()
        if kind.is_installed() and all(f.default is not MISSING for f in parameter_fields(kind))
    ]


def missing_libraries() -> dict[str, str]:
    """The installed methods whose library is not there, and the command that installs it."""
    kinds = {name: method_class(name) for name in method_names()}
    return {
        name: kind.install_command() or ""
        for name, kind in kinds.items()
        if not kind.is_installed()
    }


def method_names() -> list[str]:
    """The methods that are installed, this package's and others', in alphabetical order."""
    return sorted(_installed())


@cache
def _installed() -> dict[str, EntryPoint]:
    """By name; of two that share one the first on the path, as imports go."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, point)
    return found


def method_class(name: str) -> type[Method]:
    """The class of an installed method."""
    point = _installed().get(name)
    if point is None:
        raise RetraceError(
            f"There is no method {name!r}.{nearest(name, method_names())} "
            "`retrace methods` lists them all."
        )
    loaded = point.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise RetraceError(f"The entry point {name} ({point.value}) is not a method.")
    return loaded


def parameter_fields(method: type[Method]) -> list[Field[Any]]:
    """The parameters that a spec can set."""
    return [f for f in fields(method) if f.init and f.name != "function"]


def nearest(word: str, known: list[str]) -> str:
    """` Did you mean ...?`, or nothing where no known word is near."""
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _read_parameters(text: str, name: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise RetraceError(f"{name}: {part!r} in its spec is not of the form key=value.")
        if key.strip() in parameters:
            raise RetraceError(f"{name}: {key.strip()} stands twice in its spec.")
        parameters[key.strip()] = value.strip()
    return parameters


def _make(method: type[Method], name: str, parameters: Mapping[str, str]) -> Method:
    hints = get_type_hints(method)
    known = {f.name: f for f in parameter_fields(method)}
    values = {}
    for key, text in parameters.items():
        if key not in known:
            raise RetraceError(
                f"The method {name} has no parameter {key!r}.{nearest(key, list(known))} "
                f"It has {', '.join(known) or 'none'}."
            )
        values[key] = _convert(text, hints[key], f"{name}: {key}")
    missing = [k for k, f in known.items() if f.default is MISSING and k not in values]
    if missing:
        raise RetraceError(f"The method {name} needs {', '.join(f'{k}=...' for k in missing)}.")
    try:
        return method(**values)
    except RetraceError as error:
        raise RetraceError(f"{name}: {error}") from error


def _convert(text: str, kind: Any, where: str) -> Any:
    """A parameter's text as the type of its field."""
    if text.lower() == "none" and kind not in (Keep, Budget, str):
        return None
    kinds = getattr(kind, "__args__", (kind,))
    for value in (Keep, Budget):
        if value in kinds:
            return value.parse(text)
    try:
        if bool in kinds:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if int in kinds:
            return _bounded(int(text), where)
        if float in kinds:
            return float(text)
    except OverflowError as error:
        raise RetraceError(str(error)) from None
    except (KeyError, ValueError):
        wanted = next(k.__name__ for k in (bool, int, float) if k in kinds)
        raise RetraceError(f"{where}={text!r}: expected {wanted}.") from None
    return text


def _bounded(number: int, where: str) -> int:
    if abs(number) >= MOST_NUMBER:
        raise OverflowError(f"{where}: expected a number below {MOST_NUMBER:,}.")
    return number


def _loose_method(path: Path, name: str, parameters: str) -> MethodSpec:
    """A class or function from a file that the user named: the only code run from outside."""
    if not path.is_file():
        raise RetraceError(f"There is no file {path} to load the method {name} from.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    place = importlib.util.spec_from_file_location(f"{LOOSE}{digest[:16]}", path)
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules[place.name] = module  # where dataclasses look up annotations that are text
    try:
        place.loader.exec_module(module)
    except Exception as error:
        raise RetraceError(f"{path} could not be loaded: {error!r}.") from error
    found = getattr(module, name, None)
    label = f"{path.name}:{name}"
    if isinstance(found, type) and issubclass(found, Method):
        method = _make(found, label, _read_parameters(parameters, label))
    elif callable(found) and not isinstance(found, type):
        if parameters:
            raise RetraceError(f"{label} is a function: it takes no parameters in a spec.")
        method = Function(function=found)
    else:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RetraceError(f"{path} has no method or function {name!r}.{nearest(name, names)}")
    spec = MethodSpec(label, method, path.absolute())
    _ = spec.code  # as it is now that it is run
    return spec
