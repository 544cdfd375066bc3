"""`retrace capture`: run a model over text and store what its attention saw."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import TYPED, Command
from retrace.cli.config import CONFIG
from retrace.cli.documented import documented
from retrace.cli.parameters import FORMAT, SPEC, mapping, names, numbers, text_or_mapping
from retrace.cli.progress import bars
from retrace.cli.screen import note, plural, print_facts, print_json, size

if TYPE_CHECKING:
    from retrace.capture import CaptureEstimate
    from retrace.capture.recording.record import Progress, ShowProgress
    from retrace.traces import Trace

setting = documented("retrace.capture", "settings.py", "CaptureSettings")


@click.command(
    "capture",
    cls=Command,
    interrupted="What is finished is kept: go on with the same command and --resume "
    "(without --overwrite).",
    epilog="""\b
Example:
  retrace capture --pretrained EleutherAI/pythia-70m --tasks wikitext --limit 10
  retrace capture --pretrained builtin:smollm2 --text notes.txt --max-length 1024
  retrace capture --pretrained builtin:smollm2 --tasks needle --lengths 2048,4096
  retrace capture --pretrained Qwen/Qwen3-8B --prompts chats.jsonl --generate 128 --temperature 0.7
  retrace capture --reference traces/notes.zarr --approximate quest:page=32 --topk 64
  retrace capture --reference traces/notes.zarr --approximate plan:budgets.json
  retrace capture --reference traces/notes.zarr --approximate xattention --topk 512 \
    --protocol prefill:128
  torchrun --nproc-per-node 8 -m retrace.cli capture --pretrained Qwen/Qwen3-8B --tasks wikitext""",
)
@setting("--pretrained", metavar="MODEL")
@setting("--reference", type=click.Path(), metavar="TRACE")
@setting("--tasks", type=names, metavar="NAME,...")
@setting("--text", type=click.Path(), multiple=True, metavar="FILE")
@setting("--prompts", type=click.Path(), multiple=True, metavar="FILE")
@setting("--data", type=click.Path(), metavar="PATH")
@setting("--lengths", type=numbers, metavar="N,...")
@setting("--depths", type=numbers, metavar="PERCENT,...")
@setting("--include-path", type=click.Path(), metavar="FOLDER")
@setting("--num-fewshot", type=int, metavar="N")
@setting("--metadata", type=mapping, metavar="JSON")
@setting("--apply-chat-template", is_flag=True)
@setting("--system-instruction", metavar="TEXT")
@setting(
    "--fewshot-as-multiturn/--no-fewshot-as-multiturn", sets="fewshot_as_multiturn", default=None
)
@setting("--limit", type=int, metavar="N")
@setting("--generate", type=int, metavar="N")
@setting("--temperature", type=float, metavar="T")
@setting("--top-p", type=float, metavar="P")
@setting("--seed", type=int, metavar="N")
@setting("--stop", multiple=True, metavar="TEXT")
@setting("--batch-size", "--batch", type=int, metavar="N")
@setting("--max-length", type=int, metavar="N")
@setting("--dtype", metavar="NAME")
@setting("--device", metavar="NAME")
@setting("--device-map", type=text_or_mapping, metavar="auto|balanced|sequential|cpu|JSON")
@setting("--model-args", type=text_or_mapping, metavar="KEY=VALUE,...")
@setting("--layers", type=numbers, metavar="0,2,5-8")
@setting("--queries", metavar="WHICH")
@setting("--approximate", type=SPEC)
@setting("--topk", type=int, metavar="K")
@setting("--protocol", metavar="prefill:B")
@setting("--from-position", type=int, metavar="P")
@setting("--dense-layers", type=numbers, metavar="0,1")
@setting("--revision", metavar="NAME")
@setting("--trust-remote-code", is_flag=True)
@setting("--out", type=click.Path(), metavar="PATH")
@setting("--overwrite", is_flag=True)
@setting("--resume", is_flag=True)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Load and check the model, let it read the longest batch, and say what the trace, memory "
    "and time come to; write nothing.",
)
@FORMAT
@CONFIG
@click.pass_context
def command(ctx: click.Context, /, dry_run: bool, format: str, **settings: Any) -> None:
    """Run a model over text and store every layer's queries, keys and values in a trace.

    Under torchrun the processes share the sequences of one trace, each on a GPU of its own.
    """
    from retrace.capture import CaptureSettings, Ranks, capture, estimate_capture

    # What was not given has its default in CaptureSettings.
    given = {name: value for name, value in settings.items() if value is not None}
    if dry_run:
        with progress_bar(records=False) as progress:
            cost = estimate_capture(CaptureSettings(**given), progress)
        _print_estimate(cost, format)
        return
    with progress_bar() as progress:
        trace = capture(**given, command=ctx.meta[TYPED], progress=progress)
    if not Ranks.from_environment().first:
        return  # of several processes one prints
    tokens = sum(trace.length(sequence) for sequence in trace.sequences)
    if format == "json":
        print_json(
            {
                "trace": str(trace.path),
                "layers": len(trace.layers),
                "sequences": len(trace.sequences),
                "tokens": tokens,
                "bytes": trace.nbytes(),
                "dtype": trace.attributes["dtype"],
                "perplexity": trace.perplexity(),
            }
        )
        return
    print_facts(
        [
            ("Trace", str(trace.path)),
            (
                "Holds",
                f"{plural(len(trace.layers), 'layer')} x "
                f"{plural(len(trace.sequences), 'sequence')}, {plural(tokens, 'token')}, "
                f"{size(trace.nbytes())} in {trace.attributes['dtype']}",
            ),
            ("Perplexity", f"{trace.perplexity():.2f}"),
            ("Next", _next_command(trace)),
        ]
    )


def _print_estimate(cost: "CaptureEstimate", form: str) -> None:
    if form == "json":
        print_json(cost.to_json())
        return
    free = "" if cost.free_bytes is None else f" ({size(cost.free_bytes)} are free there)"
    memory = ", ".join(f"{size(most)} on {device}" for device, most in cost.memory.items())
    print_facts(
        [
            ("Left", f"{plural(cost.sequences, 'sequence')}, {plural(cost.tokens, 'token')}"),
            ("Trace", f"{size(cost.bytes)}{free}"),
            ("Memory", memory),
            (
                "Takes",
                f"about {cost.seconds:,.1f} s, after {cost.preparation:,.1f} s of loading and "
                "checks",
            ),
        ]
    )


def _next_command(trace: "Trace") -> str:
    """A command that analyzes the trace, with a budget that its sequences are long enough for."""
    longest = max(trace.length(sequence) for sequence in trace.sequences)
    budget = max(1, min(10, (longest - 1) // 10))
    return shlex.join(
        ["retrace", "analyze", str(trace.path), "--method", "exact", "--topk", str(budget)]
    )


@contextmanager
def progress_bar(*, records: bool = True) -> Iterator["ShowProgress"]:
    """Shows how far a capture is, on stderr; nothing where that is no terminal. One that never
    `records` has nothing left to do in the end."""
    from retrace.capture import Ranks

    with bars("{task.fields[facts]}", shown=Ranks.from_environment().first) as bar:
        row = bar.add_task("", total=None, facts="")
        begun = False

        def show(progress: "Progress") -> None:
            nonlocal begun
            if progress.stage != "recording":
                words = {"loading": "Loading model and text", "checking": "Checking the model"}
                bar.update(row, description=words[progress.stage])
                return
            if not begun:  # what is there already says nothing about the speed
                bar.reset(
                    row,
                    description="Recording",
                    total=progress.total_tokens,
                    completed=progress.tokens,
                )
                begun = True
            bar.update(row, completed=progress.tokens)
            speed = bar.tasks[0].speed
            rate = "" if speed is None else f", {speed:,.0f} tokens/s"
            bar.update(
                row,
                facts=f"{progress.sequences}/{progress.total_sequences} sequences{rate}, "
                f"{size(progress.bytes)} of {size(progress.total_bytes)}",
            )

        yield show
    if records and not begun and Ranks.from_environment().first:
        note("Nothing was left to record.")
