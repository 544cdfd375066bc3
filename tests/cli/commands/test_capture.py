"""`retrace capture`: a trace, and closing lines that say what it holds and what comes next."""

import json
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


def test_prompts_and_marks(run: Run, model: Path, place: Path) -> None:
    rows = [
        {"prompt": "word1 word2 word3", "completion": " word4", "spans": {"evidence": "word2"}},
        {"text": "word5 word6", "spans": {"evidence": [[0, 5], [6, 11]], "question": "word6"}},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("capture", "--pretrained", model, "--prompts", "p.jsonl", "--out", "t.zarr")
    trace = open_trace("t.zarr")
    assert trace.phase(0).tolist() == [0, 0, 0, 1]
    assert trace.marks(0) == {"evidence": (range(1, 2),)}
    assert trace.marks(1) == {"evidence": (range(0, 2),), "question": (range(1, 2),)}
    printed = run("info", "t.zarr").stdout
    assert "Mark evidence  3 positions in 2 sequences" in printed
    assert json.loads(run("info", "t.zarr", "--format", "json").stdout)["marks"] == {
        "evidence": {"sequences": 2, "positions": 3},
        "question": {"sequences": 1, "positions": 1},
    }
    assert "all 2 whole" in run("verify", "t.zarr").stdout


def test_mistakes_in_prompts(run: Run, model: Path, place: Path) -> None:
    for row, words in (
        ('{"messages": [{"role": "user", "content": "word1"}]}', "no chat template"),
        ('{"messages": []}', "at least one message"),
        ('{"chat": "word1"}', "expected one of text, prompt, messages"),
        ('{"text": ', "line 2 is no JSON"),
    ):
        Path("p.jsonl").write_text('{"text": "word1 word2"}\n' + row + "\n")
        result = run("capture", "--pretrained", model, "--prompts", "p.jsonl", code=2)
        [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert words in line and "line 2" in line
        assert not Path("traces").exists()
    for text in ("[1]", "{", "4096"):
        result = run("capture", "--pretrained", model, "--tasks", "x", "--metadata", text, code=2)
        assert "Invalid value for '--metadata'" in result.stderr


def test_needles(run: Run, model: Path, text: Path) -> None:
    run(
        "capture", "--pretrained", model, "--tasks", "needle", "--data", text,
        "--lengths", "100,120", "--depths", "0,100", "--seed", "3", "--out", "t.zarr",
    )  # fmt: skip
    trace = open_trace("t.zarr")
    assert [trace.length(s) for s in trace.sequences] == [100, 100, 120, 120]
    (early,), (late,) = (trace.marks(s)["evidence"] for s in (0, 1))
    assert early.start < 30 and late.start > 60
    options = trace.attributes["command"].partition(" --tasks ")[2]
    assert options.startswith("needle")


def test_what_is_drawn(run: Run, model: Path, text: Path) -> None:
    arguments = (
        "capture", "--pretrained", model, "--text", text, "--limit", "1", "--max-length", "60",
        "--generate", "20", "--temperature", "0.9", "--top-p", "0.95",
    )  # fmt: skip
    run(*arguments, "--seed", "1", "--out", "a.zarr")
    run(*arguments, "--seed", "2", "--out", "b.zarr")
    Path("c.yaml").write_text("seed: 1\nstop: [word7, word8]\n")
    run(*arguments, "--config", "c.yaml", "--out", "c.zarr")
    one, other, stopped = (open_trace(f"{n}.zarr").tokens(0).tolist() for n in "abc")
    assert one != other and one[: len(stopped)] == stopped
    assert open_trace("c.zarr").attributes["capture"]["sampling"] == {
        "temperature": 0.9, "top_p": 0.95, "seed": 1, "stop": ["word7", "word8"],
    }  # fmt: skip
