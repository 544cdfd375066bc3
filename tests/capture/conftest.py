"""Tiny random models of many architectures, saved to folders as a user would have them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "architectures.py"


def load_architectures() -> ModuleType:
    """benchmarks/architectures.py, which knows how to build a model of each family."""
    name = "retrace_benchmarks_architectures"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARK)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for an `architecture` runs for each."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", sorted(load_architectures().ARCHITECTURES))


@pytest.fixture(scope="session")
def architectures() -> ModuleType:
    """benchmarks/architectures.py as a module."""
    return load_architectures()


ModelFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Makes the folder of a tiny random model of an architecture, once for each request."""
    made: dict[str, Path] = {}

    def make(model_type: str, *, bos: bool = False, **changes: Any) -> Path:
        name = f"{model_type}-{bos}-{sorted(changes.items())}"
        if name not in made:
            folder = tmp_path_factory.mktemp(model_type)
            load_architectures().save_tiny_model(model_type, folder, bos=bos, **changes)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of some 3,000 bytes, of which each is a token."""
    path = tmp_path / "birds.txt"
    path.write_text(load_architectures().TEXT)
    return path
