"""From a method spec to a method: `quest`, `quest:page=32,pool=sum`, `./mine.py:Mine:a=1`."""

import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from retrace.analyze.methods.base import (
    AttendMethod,
    EvictionMethod,
    Method,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.methods.function import AttentionFunction, Function
from retrace.analyze.methods.hooks import own_fault, own_lines
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.storage.provenance import LOOSE, Code, code_of_method
from retrace.traces import RetraceError
from retrace.traces.errors import did_you_mean

ENTRY_POINTS = "retrace.methods"
ALL = "all"
"""In place of a spec: every installed method."""
MOST_SPECS = 1000
"""Of one run: more are a slip of the finger, or a file that was made to fill the memory."""
MOST_NUMBER = 2**31
"""Whole numbers of a spec are below this: none stands for more positions or channels."""
LEVELS: tuple[tuple[type[Method], str], ...] = (
    (ScoreMethod, "scores"),
    (SearchMethod, "search"),
    (AttendMethod, "attend"),
)
"""Kinds of method, and what each must define."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_LOOSE = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)(?::(?P<parameters>.*))?")


Methods = str | Method | type[Method] | AttentionFunction | Sequence[Any] | Mapping[str, Any]
"""One method or several, or methods by the labels that they go by in results."""


class MethodSpec:
    """A method by the name it is known by, with its parameters.

    It is pickled as text: another process loads the method, and its file, anew. A method that was
    given as an object is pickled as one.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        file: Path | None = None,
        label: str | None = None,
        text: str | None = None,
    ) -> None:
        self.name = name
        self.method = method
        self.file = file
        """The loose file that the method comes from."""
        self.label = label
        """What it goes by in results in place of its spec."""
        self.text = text
        """The spec that it was named by; None if it was given as an object."""

    @cached_property
    def code(self) -> Code:
        """The code that the method is, when it was first looked at; and what its name does not
        tell."""
        code = code_of_method(self.method)
        if self.label is None and self.text is not None:
            return code
        told = json.dumps([self.name, self.parameters], sort_keys=True).encode()
        sources = {**code.sources, "": hashlib.sha256(told).hexdigest()}
        return replace(code, sources=sources, known=code.known and self._is_told())

    def _is_told(self) -> bool:
        """Whether its file and its parameters say all that it is."""
        own = getattr(self.method, "function", type(self.method))
        values = (getattr(self.method, f.name) for f in parameter_fields(type(self.method)))
        return "<" not in getattr(own, "__qualname__", "<") and all(
            isinstance(value, Keep | Budget | int | float | str | None) for value in values
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter with its value, as text or number."""
        return {
            f.name: _plain(getattr(self.method, f.name))
            for f in parameter_fields(type(self.method))
        }

    def __str__(self) -> str:
        """Its label, or the shortest spec that gives this method: parameters at their default are
        left out."""
        if self.label is not None:
            return self.label
        changed = [
            f"{f.name}={self.parameters[f.name]}"
            for f in parameter_fields(type(self.method))
            if self.parameters[f.name] != _plain(_default(f))
        ]
        return ":".join([self.name, *([",".join(changed)] if changed else [])])

    def labelled(self, label: str | None) -> "MethodSpec":
        """The same by another name."""
        return MethodSpec(self.name, self.method, self.file, label, self.place)

    @property
    def place(self) -> str:
        """The spec that gives this method wherever it is read: with the loose file's whole path."""
        if self.label is not None and self.text is not None:
            return self.text
        return str(self) if self.file is None else f"{self.file.parent}/{self}"

    def anew(self) -> Method:
        """The method as it is before anything was asked of it: of a loose file, by loading it
        again."""
        return replace(self.method) if self.file is None else parse_spec(self.place).method

    def check_named(self) -> None:
        """Refuse a method that no spec names, and that so cannot be found again.

        Raises:
            RetraceError: it was given as an object, or by a label.
        """
        if self.text is None or self.label is not None:
            raise RetraceError(
                f"{self}: parts are merged by the specs of their methods. Put it in a file, and "
                "name that without a label, as in ./mine.py:Mine."
            )

    def check_portable(self) -> None:
        """Refuse a method that other processes cannot load.

        Raises:
            RetraceError: it was given as an object whose class they cannot import.
        """
        if self.text is not None:
            return
        own = getattr(self.method, "function", type(self.method))
        module, name = getattr(own, "__module__", "__main__"), getattr(own, "__qualname__", "")
        if module == "__main__" or "<" in name or module not in sys.modules:
            raise RetraceError(
                f"{self} is defined in {'a function' if '<' in name else module}, where other "
                "processes cannot import it from: put it in a file and name that, as in "
                f"./mine.py:{own.__name__}, or run it in this one with workers=1."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.text is None:
            return MethodSpec, (self.name, self.method, None, self.label)
        return same_spec, (self.place, self.code.sources_digest, self.label)


def parse_spec(text: str) -> MethodSpec:
    """The method that a spec names.

    Raises:
        RetraceError: no such method or parameter (with the nearest name), or a bad value.
    """
    if loose := _LOOSE.fullmatch(text):
        return _loose_method(Path(loose["path"]), loose["name"], loose["parameters"] or "")
    name, _, parameters = text.partition(":")
    method = _make(method_class(name), name, _read_parameters(parameters, name))
    return MethodSpec(name, method, text=text)


def given_spec(given: Any, label: str | None = None) -> MethodSpec:
    """The method that was given: as a `MethodSpec`, an object, a class or an attention function.

    Raises:
        RetraceError: it is none of these, or lacks what a method of its kind must have.
    """
    if isinstance(given, MethodSpec):
        return given
    if isinstance(given, type) and issubclass(given, Method):
        given = _make(given, given.__name__, {})
    elif callable(given) and not isinstance(given, Method | type):
        given = Function(function=given)
    if not isinstance(given, Method):
        raise RetraceError(
            f"{given!r:.200} is no method: expected a spec such as 'quest:page=32', an object or "
            "class of ScoreMethod, SearchMethod or AttendMethod, or an attention function."
        )
    kind = type(given)
    name = kind.__name__
    if isinstance(given, Function):
        name = getattr(given.function, "__name__", type(given.function).__name__)
    check_complete(given, name)
    for known, point in _installed().items():
        if point.value == f"{kind.__module__}:{kind.__qualname__}":
            text = str(MethodSpec(known, given))
            if (spec := parse_spec(text)).method == given:
                return spec.labelled(label)
    return MethodSpec(name, given, label=label)


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
def same_spec(text: str, sources_digest: str, label: str | None = None) -> MethodSpec:
    """The method that a spec named before, in another process.

    Raises:
        RetraceError: a file of its code is gone or is another here.
    """
    spec = parse_spec(text)
    spec = spec if label is None else spec.labelled(label)
    if spec.code.sources_digest != sources_digest:
        raise RetraceError(
            f"The code of {spec}, or what it imports, was edited since the run began, or is "
            "another on this worker: run it again."
        )
    return spec


def listed(methods: Methods) -> list[Any]:
    """Methods one by one: as they were given, or a `MethodSpec` for what has a label.

    Raises:
        RetraceError: a label that cannot stand in a table, or whose spec is several methods.
    """
    if isinstance(methods, Mapping):
        return [_labelled(label, given) for label, given in methods.items()]
    if isinstance(methods, str | Method | type) or not isinstance(methods, Iterable):
        return [methods]
    return list(methods)


def _labelled(label: Any, given: Any) -> MethodSpec:
    if not isinstance(label, str) or not label.strip() or not label.isprintable():
        raise RetraceError(f"The label {label!r:.200}: expected a name that can be printed.")
    if not isinstance(given, str):
        spec = given_spec(given, label)
        return spec if spec.label == label else spec.labelled(label)
    if given == ALL or _BRACES.search(given):
        raise RetraceError(f"The label {label!r} is for one method, and {given!r} is several.")
    return parse_spec(given).labelled(label)


def parse_specs(methods: Methods) -> tuple[list[MethodSpec], frozenset[str]]:
    """The methods that are named or given, each once, and which of them `all` stands for alone.

    `quest:page={8,16}` stands for one method with each value, several braces for each combination.
    `all` is every installed method with its defaults, less those whose library is missing.

    Raises:
        RetraceError: no method at all, more than `MOST_SPECS`, or two different ones of one name.
    """
    asked = listed(methods)
    grids = {i: _grid(one) for i, one in enumerate(asked) if isinstance(one, str) and one != ALL}
    count = sum(math.prod(map(len, values)) for _, values in grids.values())
    if count > MOST_SPECS:
        raise RetraceError(
            f"The methods have {count:,} combinations of values; a run takes {MOST_SPECS:,}."
        )
    named: list[MethodSpec] = []
    for i, one in enumerate(asked):
        if i in grids:
            named += [parse_spec(text) for text in _filled(*grids[i])]
        elif not isinstance(one, str):
            named.append(given_spec(one))
    every = _every_method() if ALL in [one for one in asked if isinstance(one, str)] else []
    if not named and not every:
        raise RetraceError("No method is named; `retrace methods` lists them.")
    unique: dict[str, MethodSpec] = {}
    for spec in [*named, *every]:
        first = unique.setdefault(str(spec), spec)
        if first is not spec and _are_different(first, spec):
            raise RetraceError(f"Two different methods are {spec}: rename one, or give it a label.")
    return list(unique.values()), frozenset(map(str, every)) - frozenset(map(str, named))


def _are_different(ours: MethodSpec, other: MethodSpec) -> bool:
    """Whether two methods of one name are not the same."""
    if ours.text is not None and other.text is not None:
        return ours.code != other.code
    kinds = [getattr(spec.method, "function", type(spec.method)) for spec in (ours, other)]
    return kinds[0] is not kinds[1] or ours.code != other.code


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
            f"There is no method {name!r}.{did_you_mean(name, method_names())} "
            "`retrace methods` lists them all."
        )
    loaded = point.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise RetraceError(f"The entry point {name} ({point.value}) is not a method.")
    return loaded


def parameter_fields(method: type[Method]) -> list[Field[Any]]:
    """The parameters that a spec can set."""
    return [f for f in fields(method) if f.init and f.name != "function"]


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
    _check_fields(method, name)
    hints = get_type_hints(method)
    known = {f.name: f for f in parameter_fields(method)}
    values = {}
    for key, text in parameters.items():
        if key not in known:
            raise RetraceError(
                f"The method {name} has no parameter {key!r}.{did_you_mean(key, list(known))} "
                f"It has {', '.join(known) or 'none'}."
            )
        values[key] = _convert(text, hints[key], f"{name}: {key}")
    missing = [k for k, f in known.items() if f.default is MISSING and k not in values]
    if missing:
        raise RetraceError(f"The method {name} needs {', '.join(f'{k}=...' for k in missing)}.")
    try:
        made = method(**values)
    except RetraceError as error:
        raise RetraceError(f"{name}: {error}") from error
    except Exception as error:
        raise own_fault(f"{name}()", error) from error
    check_complete(made, name)
    return made


def check_complete(method: Method, name: str) -> None:
    """Refuse a method that lacks what its kind must have."""
    kind = type(method)
    _check_fields(kind, name)
    needed: list[tuple[type[Method], str]] = []
    needed += [(level, hook) for level, hook in LEVELS if isinstance(method, level)]
    if isinstance(method, EvictionMethod) and kind.build is EvictionMethod.build:
        needed.append((EvictionMethod, "importance"))
    if not needed:
        raise RetraceError(
            f"{name} must be a ScoreMethod, a SearchMethod or an AttendMethod, and not a Method "
            "alone."
        )
    keeps_new = isinstance(method, ScoreMethod) and method.keeps_new
    needed += [(Method, "extend")] if method.fitted and not keeps_new else []
    needed += [(Method, "calibrate")] if method.calibrated else []
    for level, hook in needed:
        if getattr(kind, hook) is getattr(level, hook):
            raise RetraceError(f"{name} must define {hook}(), as every {_words(level, hook)} does.")


def _words(level: type[Method], hook: str) -> str:
    if level is not Method:
        return level.__name__
    return "fitted method" if hook == "extend" else "calibrated method"


def _check_fields(kind: type[Method], name: str) -> None:
    """Refuse a class whose parameters are no fields: nobody could set them."""
    for written in kind.__mro__:
        if "__dataclass_fields__" in written.__dict__ or not issubclass(written, Method):
            continue
        own = [
            word
            for word, hint in inspect.get_annotations(written).items()
            if "ClassVar" not in str(hint)
        ]
        if own:
            raise RetraceError(
                f"{name}: {', '.join(own)} cannot be set, since {written.__name__} is no "
                "dataclass: write @dataclass(frozen=True, kw_only=True) above it."
            )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    """A parameter's value as text or number."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)


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
        told = RetraceError(f"{path} could not be loaded: {error!r}.")
        told.add_note(own_lines(error))
        raise told from error
    found = getattr(module, name, None)
    label = f"{path.name}:{name}"
    if isinstance(found, type) and issubclass(found, Method):
        method = _make(found, label, _read_parameters(parameters, label))
    elif callable(found) and not isinstance(found, type):
        if parameters:
            raise RetraceError(f"{label} is a function: it takes no parameters in a spec.")
        method = Function(function=found)
    else:
        if isinstance(found, type):
            raise RetraceError(
                f"{label} is a class, but no method: derive it from ScoreMethod, SearchMethod or "
                "AttendMethod."
            )
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RetraceError(f"{path} has no method or function {name!r}.{did_you_mean(name, names)}")
    spec = MethodSpec(label, method, path.absolute())
    spec.text = spec.place
    _ = spec.code  # as it is now that it is run
    return spec
