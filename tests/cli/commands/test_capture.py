"""`retrace capture`: a trace, and closing lines that say what it holds and what comes next."""

import shlex
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from retrace.traces import open_trace

Run = Callable[..., Result]


def test_capture_then_the_command_it_names(run: Run, model: Path, text: Path) -> None:
    result = run("capture", "--pretrained", model, "--text", text, "--max_length", "100")
    trace = open_trace("traces/tiny-llama-words.zarr")
    assert "traces/tiny-llama-words.zarr" in result.stdout
    assert "2 layers x 4 sequences, 400 tokens" in result.stdout
    assert f"Perplexity  {trace.perplexity():.2f}" in result.stdout
    assert not result.stderr  # no progress bar where there is no terminal
    [line] = [line for line in result.stdout.splitlines() if line.startswith("Next")]
    program, *command = shlex.split(line.removeprefix("Next"))
    assert program == "retrace"
    assert "### exact, top-k 9" in run(*command).stdout  # no query would count for 10


def test_what_was_typed_is_in_the_trace(run: Run, model: Path, text: Path) -> None:
    arguments = ["--pretrained", str(model), "--text", str(text), "--limit", "1", "--out", "t.zarr"]
    run("capture", *arguments)
    assert open_trace("t.zarr").attributes["command"] == shlex.join(
        ["retrace", "capture", *arguments]
    )


def test_settings(run: Run, model: Path, text: Path) -> None:
    Path("c.yaml").write_text(f"pretrained: {model}\ntext: {text}\nlayers: 1\nlimit: 3\n")
    run(
        "capture", "--config", "c.yaml", "--batch", "2", "--queries", "last:5",
        "--max-length", "80", "--out", "t.zarr", env={"RETRACE_CAPTURE_DTYPE": "bfloat16"},
    )  # fmt: skip
    trace = open_trace("t.zarr")
    assert trace.layers == (1,)
    assert len(trace.sequences) == 3
    assert trace.attributes["dtype"] == "bfloat16"
    assert trace.query_positions(0).tolist() == list(range(16, 80))
    assert trace.attributes["batch_size"] == 2


def test_a_trace_that_is_there_is_kept(run: Run, model: Path, text: Path) -> None:
    arguments = ("capture", "--pretrained", model, "--text", text, "--limit", "1")
    run(*arguments)
    result = run(*arguments, code=2)
    assert "--overwrite" in result.stderr and "--resume" in result.stderr
    run(*arguments, "--overwrite")
    assert "1 sequence," in run(*arguments, "--resume").stdout
