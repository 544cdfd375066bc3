"""Which code figures come from: digests that change with it, so that no figure outlives it.

The code of a module is its source file and those of all modules that it imports, also within
functions. Installed packages stand by name and version, the standard library by nothing. A package
that is installed from a folder or a repository (editable or not) may change without its version: it
is read like a loose file, as are retrace itself and the package that a method is of.
"""

import ast
import hashlib
import importlib.metadata
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from retrace.traces import RetraceError

ENGINE = ("retrace.analyze.replay.engine", "retrace.analyze.tables.build")
"""The modules that turn what methods answer into figures, with all that they import."""
DRAWING = "retrace.analyze.outputs"
"""What is imported of retrace to show figures that are there: no part of any code."""
LOOSE = "retrace_loose_"
"""Modules of loose files are named so, which are run anew whenever they are named."""


@dataclass(frozen=True)
class Code:
    """What some modules are made of."""

    sources: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each module's file, by the module's name; and of other files, by theirs."""
    packages: dict[str, str] = field(default_factory=dict)
    """Versions of the installed packages that they import."""
    known: bool = True
    """False where some of it has no file, as what is typed into a notebook."""

    @property
    def digest(self) -> str | None:
        """Names all of it: 64 hex digits; None where some of it cannot be looked at."""
        return _digest([self.sources, self.packages]) if self.known else None

    @property
    def sources_digest(self) -> str:
        """Names the files, of which workers must have the same."""
        return _digest(self.sources)


@cache
def engine() -> str:
    """Names the code of retrace that all figures come from, whatever the method.

    All of it counts, and not the version alone, since between two releases there are many states.
    """
    return _known(code_of_modules(ENGINE))


@cache
def code_digest(*modules: str) -> str:
    """Names the code of modules of retrace, as this process found it."""
    return _known(code_of_modules(modules))


def _known(code: Code) -> str:
    if code.digest is None:
        raise RetraceError("retrace's own source files are not there: install it anew.")
    return code.digest


def code_of_method(method: Any) -> Code:
    """The code of a method: of its class and those above it, or of its function, and the files that
    it says it reads."""
    kind = type(method)
    own = getattr(method, "function", None)
    while (inner := getattr(own, "func", None)) is not None:  # a partial of another
        own = inner
    written = kind if own is None else own if isinstance(own, FunctionType) else type(own)
    classes = [c.__module__ for c in kind.__mro__ if c is not object]
    code = code_of_modules(dict.fromkeys([written.__module__, *classes]))
    module = sys.modules.get(written.__module__)
    folder = Path(getattr(module, "__file__", None) or ".").absolute().parent
    reads = getattr(method, "reads", ()) or getattr(own, "reads", ())
    for place in [reads] if isinstance(reads, str | Path) else reads:
        code.sources[str(place)] = _digest_of_files(folder / place, written.__name__)
    return code


def code_of_modules(names: Iterable[str]) -> Code:
    """The code of modules, by their names; they are loaded, or can be."""
    roots = list(names)
    own = {name.partition(".")[0] for name in roots} | {"retrace"}
    own_packages = {package for top in own if (package := _package_of(top)) is not None}
    sources: dict[str, str] = {}
    packages: dict[str, str] = {}
    known, seen, left = True, set[str](), list(reversed(roots))
    while left:
        name = left.pop()
        if name in seen or name.startswith(DRAWING):
            continue
        seen.add(name)
        found = _find(name)
        if found is None or _is_standard(found.origin):
            known &= name not in roots  # typed in, or made by exec
            continue
        top = name.partition(".")[0]
        package = None if top in own else _package_of(top)
        if package is not None and package not in own_packages:
            packages[package.name] = package.version
            continue
        content = _own_content(found.origin) if name.startswith("retrace.") else _content(found)
        if content is None:
            # A folder without a file is nothing by itself.
            known &= found.submodule_search_locations is not None
            continue
        sources[name] = hashlib.sha256(content).hexdigest()
        _check_loaded(name, found, sources[name])
        left += reversed(list(_imported(name, found, content)))
    return Code(dict(sorted(sources.items())), dict(sorted(packages.items())), known)


def _imported(name: str, found: ModuleSpec, content: bytes) -> Iterator[str]:
    """Names of the modules that one imports, those above them first."""
    is_package = found.submodule_search_locations is not None
    package = name if is_package else name.rpartition(".")[0]
    for level, base, names in _import_statements(content):
        above = package.split(".") if level else []
        parts = above[: len(above) - level + 1 if level else 0] + (base.split(".") if base else [])
        yield from (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        yield from (".".join([*parts, one]) for one in names)  # modules, or what is in one
    if not name.startswith("retrace."):
        yield from _held(name)


def _held(name: str) -> Iterator[str]:
    """Modules that a loaded one holds, or holds something of: it may have imported them by names
    that no reader finds out."""
    for value in list(vars(sys.modules.get(name, object)).values()):
        if not isinstance(value, ModuleType | type | FunctionType):
            continue
        own = value.__name__ if isinstance(value, ModuleType) else value.__module__
        if isinstance(own, str) and own in sys.modules and not own.startswith(f"{name}."):
            yield own


@lru_cache(maxsize=4096)
def _import_statements(content: bytes) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """Each import of a source file: how many folders up, of what, and which names of it."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return ()  # no Python, such as a compiled module
    found: list[tuple[int, str, tuple[str, ...]]] = []
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names if alias.name != "*")
            found.append((node.level, node.module or "", names))
        elif isinstance(node, ast.Call) and (named := _named_module(node)):
            base = named.lstrip(".")
            found.append((len(named) - len(base), base, ()))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            left += node.orelse  # what is imported for types only is never run
        else:
            left += ast.iter_child_nodes(node)
    return tuple(found)


def _named_module(call: ast.Call) -> str | None:
    """The module that `import_module("name")` or `__import__("name")` loads."""
    called = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    )
    if called not in ("import_module", "__import__") or not call.args:
        return None
    given = call.args[0]
    is_text = isinstance(given, ast.Constant) and isinstance(given.value, str)
    return given.value if is_text else None  # type: ignore[attr-defined]


def _find(name: str) -> ModuleSpec | None:
    """Where a module is, without loading it; None where there is none."""
    module = sys.modules.get(name)
    found: ModuleSpec | None = getattr(module, "__spec__", None)
    if found is not None:
        return found
    if module is not None and getattr(module, "__file__", None):  # a script that is run
        return ModuleSpec(name, None, origin=module.__file__)
    if name == "__main__":  # typed in
        return None
    above, _, last = name.rpartition(".")
    path: Sequence[str] | None = None
    if above:
        parent = _find(above)
        path = None if parent is None else parent.submodule_search_locations
        if path is None:
            return None
    for finder in sys.meta_path:
        try:
            found = finder.find_spec(name, path)
        except (ImportError, AttributeError, ValueError, OSError):
            found = None
        except KeyError:  # a folder without __init__.py in another that nobody has imported
            found = ModuleSpec(name, None, is_package=True)
            found.submodule_search_locations = [str(Path(at, last)) for at in path or ()]
        if found is not None:
            return found
    return None


def _content(found: ModuleSpec) -> bytes | None:
    """A module's file; None where there is none to be read."""
    if found.origin is None:
        return None
    try:
        read = getattr(found.loader, "get_data", None)
        data: bytes = Path(found.origin).read_bytes() if read is None else read(found.origin)
    except OSError:
        return None
    return data


@cache
def _own_content(origin: str | None) -> bytes | None:
    """A file of retrace as this process found it first, which is what it runs."""
    return None if origin is None else Path(origin).read_bytes()


@cache
def _standard_folders() -> tuple[list[Path], list[Path]]:
    """Folders of the standard library, and those within them of installed packages."""
    paths = sysconfig.get_paths()
    standard = {Path(paths[name]).resolve() for name in ("stdlib", "platstdlib")}
    installed = {Path(paths[name]).resolve() for name in ("purelib", "platlib")}
    within = {f / name for f in standard for name in ("site-packages", "dist-packages")}
    return sorted(standard), sorted(installed | within)


@lru_cache(maxsize=4096)
def _is_standard(origin: str | None) -> bool:
    """Whether a module, by its file, is of Python itself."""
    if origin in ("built-in", "frozen"):
        return True
    if origin is None:
        return False
    file = Path(origin).resolve()
    standard, installed = _standard_folders()
    return any(file.is_relative_to(folder) for folder in standard) and not any(
        file.is_relative_to(folder) for folder in installed
    )


@dataclass(frozen=True)
class _Package:
    """An installed package."""

    name: str
    version: str


def _package_of(top: str) -> _Package | None:
    """The installed package that a module of this name, without a dot, is of, if its version says
    what is in it."""
    found = _find(top)
    if found is None or top == "__main__":
        return None
    within = found.submodule_search_locations
    places = [found.origin] if found.origin else list(within or ())
    depth = 1 if found.origin and within is not None else 0  # __init__.py is in its folder
    for place in places:
        package = _package_in(top, Path(place).parents[depth])
        if package is not None:
            return package
    return None


@cache
def _package_in(top: str, folder: Path) -> _Package | None:
    held = _distribution(top, folder)
    if held is None or held.read_text("direct_url.json") is not None:
        return None
    return _Package(str(held.metadata["Name"]), held.version)


def _distribution(top: str, folder: Path) -> importlib.metadata.Distribution | None:
    """What was installed into a folder and brought a module along."""
    if not folder.is_dir() or not any(folder.glob("*.dist-info")):
        return None
    for one in importlib.metadata.distributions(name=top, path=[str(folder)]):
        return one
    return _by_module(folder).get(top)


@cache
def _by_module(folder: Path) -> dict[str, importlib.metadata.Distribution]:
    """What is installed in a folder by the modules that it brought, which takes a second."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for one in importlib.metadata.distributions(path=[str(folder)]):
        listed = (one.read_text("top_level.txt") or "").split()
        for name in listed or {file.parts[0].partition(".")[0] for file in one.files or ()}:
            found.setdefault(name, one)
    return found


_loaded: dict[str, tuple[ModuleType, str]] = {}
"""Modules of this process, and what their files were like when they were looked at first."""


def _check_loaded(name: str, found: ModuleSpec, digest: str) -> None:
    """Refuse to call code new that was loaded before it was edited.

    Raises:
        RetraceError: the file of a loaded module is another than it was.
    """
    module = sys.modules.get(name)
    if module is None or name.startswith(LOOSE) or name == "__main__":
        return
    known, before = _loaded.setdefault(name, (module, digest))
    if known is not module:
        _loaded[name] = module, digest
    elif before != digest:
        raise RetraceError(
            f"{found.origin} was edited since this process loaded it, and is not loaded twice: "
            "start Python anew."
        )


def _digest_of_files(place: Path, method: str) -> str:
    """Of a file, or of all in a folder."""
    files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
    known = []
    for file in files:
        try:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise RetraceError(
                f"{method} says that it reads {file}, which cannot be read ({error.strerror})."
            ) from error
        known.append([file.relative_to(place).as_posix(), found])
    return _digest(known)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
