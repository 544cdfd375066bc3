"""No figure outlives the code that it comes from."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retrace.analyze import analyze, calibrate, parse_spec
from retrace.analyze.storage.provenance import Code, code_of_method, code_of_modules
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
MINE = """
import torch
from dataclasses import dataclass
from retrace.analyze import ScoreMethod
from own_helper import sign

@dataclass(frozen=True, kw_only=True)
class Mine(ScoreMethod):
    def scores(self, state, queries, positions):
        return (sign() * torch.arange(1.0 * state.end)).expand(*queries.shape[:2], -1)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules, first on the path; what is loaded of them is forgotten afterwards."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget()


def forget() -> None:
    """As another process would find it."""
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def write(folder: Path, **files: str) -> None:
    """Modules by name, with `_in_` between a folder and what is in it."""
    for name, text in files.items():
        file = folder / f"{name.replace('_in_', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    "line",
    [
        "import own_helper",
        "from own_helper import f",
        "from own_helper import *",
        "def late():\n    import own_helper",
        "class A:\n    try:\n        from own_helper import f\n    finally:\n        pass",
        "import importlib\nhelper = importlib.import_module('own_helper')",
        "helper = __import__('own_helper')",
        "import own_between",
        "from own_package.deep import f",
        "import own_package.deep",
        "from own_package import relative",
    ],
)
def test_what_is_imported_counts(place: Path, line: str) -> None:
    write(
        place,
        own_root=line,
        own_helper="f = 1",
        own_between="from own_helper import f",
        own_package_in_deep="import own_helper",
        own_package_in_relative="from . import deep",
    )
    before = code_of_modules(["own_root"])
    assert "own_helper" in before.sources
    assert code_of_modules(["own_root"]) == before
    write(place, own_helper="f = 2")
    assert code_of_modules(["own_root"]).digest != before.digest


def test_a_folder_in_a_folder_that_nobody_has_imported(place: Path) -> None:
    write(place, own_file="def late():\n    from own_outer.inner.deep import f")
    write(place, own_outer_in_inner_in_deep="x = 1")
    before = code_of_modules(["own_file"])
    write(place, own_outer_in_inner_in_deep="x = 2")
    assert code_of_modules(["own_file"]) != before


def test_what_is_not_imported_does_not_count(place: Path) -> None:
    write(
        place,
        own_root="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import own_types",
        own_types="",
        own_other="",
    )
    assert list(code_of_modules(["own_root"]).sources) == ["own_root"]


def test_a_name_put_together_is_found_in_what_is_loaded(place: Path) -> None:
    write(
        place,
        own_root="import importlib\nhelper = importlib.import_module('own_' + 'helper')",
        own_helper="",
    )
    __import__("own_root")
    assert "own_helper" in code_of_modules(["own_root"]).sources


@pytest.mark.parametrize("editable", [False, True])
def test_installed_packages(place: Path, editable: bool) -> None:
    write(place, own_root="import own_library", own_library_in_part="x = 1")
    write(place, own_library_in___init__="from own_library import part")
    info = place / "Own_Library-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Own-Library\nVersion: 1.0\n")
    (info / "RECORD").write_text("own_library/__init__.py,,\nown_library/part.py,,\n")
    if editable:
        (info / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {}}')
    before = code_of_modules(["own_root"])
    write(place, own_library_in_part="x = 2")
    after = code_of_modules(["own_root"])
    if editable:
        assert before.digest != after.digest
    else:
        assert before == after
        assert before.packages == {"Own-Library": "1.0"}
    # A method's own package is read whatever its version says.
    assert "own_library.part" in code_of_modules(["own_library"]).sources


def test_what_has_no_file_is_unknown() -> None:
    typed: dict[str, Any] = {}
    exec("class Typed: pass", typed)
    assert code_of_method(typed["Typed"]()).digest is None
    assert Code().digest is not None


def test_files_that_a_method_names(place: Path) -> None:
    write(place, own_root="class Mine:\n    reads = ('weights', 'one.txt')")
    (place / "weights").mkdir()
    (place / "weights" / "a.bin").write_bytes(b"1")
    (place / "one.txt").write_text("1")
    method = __import__("own_root").Mine()
    known = {code_of_method(method).digest}
    (place / "weights" / "b.bin").write_bytes(b"1")
    known.add(code_of_method(method).digest)
    (place / "one.txt").write_text("2")
    known.add(code_of_method(method).digest)
    assert len(known) == 3
    (place / "one.txt").unlink()
    with pytest.raises(RetraceError, match=r"Mine says that it reads .*one\.txt"):
        code_of_method(method)


def test_loaded_code_is_not_called_new(place: Path) -> None:
    write(place, own_helper="f = 1")
    __import__("own_helper")
    code_of_modules(["own_helper"])
    write(place, own_helper="f = 2")
    with pytest.raises(RetraceError, match=r"own_helper\.py was edited since this process loaded"):
        code_of_modules(["own_helper"])


def mean(results: Any, method: str) -> float:
    """Recall over all heads."""
    rows = results.metrics
    return float(rows[(rows.method == method) & (rows.metric == "recall")]["mean"].mean())


def test_results_of_a_changed_helper(
    make_trace: MakeTrace, rules: Any, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "retrace")
    trace, out = make_trace(rules()), place / "r"
    write(place, own_mine=MINE, own_helper="def sign(): return 1")
    spec = f"{place}/own_mine.py:Mine"
    methods = ["exact", spec]
    first = analyze(trace, methods, [2, 3], out=out, keep_exact=False, min_context=20)
    same = analyze(trace, methods, [2], out=out, keep_exact=False, min_context=20)
    day = first.run["history"][0]["when"][:10]
    assert f"kept: exact, own_mine.py:Mine at top-k 2 from {day}" in caplog.text
    assert len(same.run["history"]) == 1
    write(place, own_helper="def sign(): return -1")
    forget()
    caplog.clear()
    changed = analyze(trace, methods, [2], out=out, keep_exact=False, min_context=20)
    assert "changed: own_mine.py:Mine." in caplog.text
    assert f"kept: exact at top-k 2 from {day}" in caplog.text
    assert changed.run["history"][1]["methods"] == {"own_mine.py:Mine": [2]}
    forget()
    fresh = analyze(trace, methods, [2], keep_exact=False, min_context=20)
    assert mean(changed, "own_mine.py:Mine") == mean(fresh, "own_mine.py:Mine")
    assert changed.topk("exact") == [2, 3]
    assert changed.topk("own_mine.py:Mine") == [2]


def test_another_engine(
    make_trace: MakeTrace,
    rules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trace, out = make_trace(rules()), tmp_path / "r"
    analyze(trace, ["exact", "random"], [2], out=out, keep_exact=False)
    monkeypatch.setattr("retrace.analyze.replay.settings.engine", lambda: "0" * 64)
    results = analyze(trace, ["random"], [2], out=out, keep_exact=False)
    assert results.run["history"][1]["methods"] == {"random": [2]}
    assert results.run["outdated"] == ["exact"]
    assert "figures of other code than there is now: exact." in caplog.text
    assert "exact" in results.markdown().partition("###")[0]
    results = analyze(trace, ["exact", "random"], [2], out=out, keep_exact=False)
    assert results.run["history"][2]["methods"] == {"exact": [2]}
    assert results.run["outdated"] == []


def test_again(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace, out = make_trace(rules()), tmp_path / "r"
    analyze(trace, ["exact", "random"], [2, 3], out=out, keep_exact=False)
    results = analyze(trace, ["random"], [4], out=out, keep_exact=False, again=True)
    assert results.run["history"][1]["methods"] == {"random": [2, 3, 4]}
    assert results.topk("random") == [2, 3, 4]
    assert results.topk("exact") == [2, 3]


def test_what_was_learnt_by_other_code(
    make_trace: MakeTrace, rules: Any, place: Path, tmp_path: Path
) -> None:
    learning = """
from dataclasses import dataclass
from retrace.analyze import ScoreMethod
from own_helper import learnt

@dataclass(frozen=True, kw_only=True)
class Mine(ScoreMethod):
    calibrated = True

    def calibrate(self, pasts):
        return {"x": pasts[0].keys.mean() * 0 + learnt()}

    def scores(self, state, queries, positions):
        kept = float(state.calibration["x"])
        return (state.keys[:, 0] * kept)[: int(positions[-1]) + 1].expand(*queries.shape[:2], -1)
"""
    trace = make_trace(rules(), [40, 40, 40, 40], name="own")
    write(place, own_mine=learning, own_helper="def learnt(): return 1.0")
    spec = f"{place}/own_mine.py:Mine"
    first = calibrate(trace, spec)
    assert calibrate(trace, spec) == first
    write(place, own_helper="def learnt(): return -1.0")
    forget()
    assert set(calibrate(trace, spec)).isdisjoint(first)


def test_exact_answers_of_other_code(
    make_trace: MakeTrace, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace(rules(), name="own")
    analyze(trace, topk=[2])
    (file, *_) = trace.path.with_name("own.exact").rglob("*.npz")
    before = file.stat().st_mtime_ns
    analyze(trace, topk=[2])
    assert file.stat().st_mtime_ns == before
    monkeypatch.setattr("retrace.analyze.exact.store.code_digest", lambda *_: "ab" * 32)
    analyze(trace, topk=[2])
    assert file.stat().st_mtime_ns > before


def test_parts_of_other_code(
    make_trace: MakeTrace, rules: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, out = make_trace(rules(), [40, 40]), place / "r"
    write(place, own_mine=MINE, own_helper="def sign(): return 1")
    spec = f"{place}/own_mine.py:Mine"
    analyze(trace, [spec], [2], out=out, keep_exact=False, part=(1, 2))
    write(place, own_helper="def sign(): return -1")
    forget()
    found = analyze(trace, [spec], [2], out=out, keep_exact=False)
    forget()
    fresh = analyze(trace, [spec], [2], keep_exact=False)
    assert mean(found, "own_mine.py:Mine") == mean(fresh, "own_mine.py:Mine")


def test_installed_methods_say_which_code_they_are() -> None:
    code = parse_spec("quest").code
    assert "retrace.analyze.methods.quest" in code.sources
    assert "retrace.analyze.methods.base" in code.sources
    assert "torch" in code.packages
    assert code.known
