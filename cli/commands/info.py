"""`retrace info`: what a trace holds."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import Command
from retrace.cli.facts import model_name, task_names
from retrace.cli.parameters import ROWS_FORMAT
from retrace.cli.screen import (
    note,
    plural,
    print_csv,
    print_facts,
    print_json,
    print_table,
    ranges,
    size,
)

if TYPE_CHECKING:
    from retrace.traces import Trace


@click.command(
    "info",
    cls=Command,
    epilog="""\b
Example:
  retrace info traces/pythia-70m-wikitext.zarr
  retrace info traces/pythia-70m-wikitext.zarr --card README.md --license apache-2.0""",
)
@click.argument("trace", type=click.Path())
@click.option(
    "--card",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a dataset card for the Hugging Face Hub there, too; a file that is there is kept.",
)
@click.option("--license", metavar="NAME", help="License that the card names, such as apache-2.0.")
@ROWS_FORMAT
def command(trace: str, card: Path | None, license: str | None, format: str) -> None:
    """Print what TRACE holds: model, sequences, layers and their rules."""
    from retrace.traces import open_trace

    opened = open_trace(trace)
    facts = describe(opened)
    if card is not None:
        _write_card(card, facts, opened.path.name, license)
    elif license is not None:
        raise click.UsageError("--license is the card's: name its file with --card.")
    if format == "json":
        print_json(facts)
    elif format == "csv":
        named = {"trace": facts["trace"]}
        print_csv([{**named, **one, "layers": ranges(one["layers"])} for one in facts["layers"]])
    else:
        _print(facts, format)


def _write_card(file: Path, facts: dict[str, Any], name: str, license: str | None) -> None:
    from retrace.cli.card import card as written
    from retrace.traces import RetraceError

    text = written(facts, name, license)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise RetraceError(f"{file} is there already: remove it, or name another file.") from None
    note(f"Card: {file}")


def describe(trace: "Trace") -> dict[str, Any]:
    """A trace's facts; layers of equal rules that follow each other are one entry."""
    lengths = [trace.length(sequence) for sequence in trace.sequences]
    return {
        "trace": str(trace.path),
        "format": trace.attributes["retrace_format"],
        "model": trace.attributes.get("model"),
        "task": trace.attributes.get("task"),
        "dtype": trace.attributes["dtype"],
        "sequences": {"finished": len(trace.sequences), "planned": trace.planned},
        "tokens": sum(lengths),
        "lengths": {"least": min(lengths, default=0), "most": max(lengths, default=0)},
        "queries": sum(len(trace.query_positions(sequence)) for sequence in trace.sequences),
        "marks": _marks(trace),
        "bytes": trace.nbytes(),
        "perplexity": trace.perplexity(),
        "layers": _layer_groups(trace),
        "unrecorded_layers": trace.attributes.get("unrecorded_layers", []),
        "copied": trace.attributes.get("copied", []),
        "created": trace.attributes.get("created"),
        "command": trace.attributes.get("command"),
        "versions": trace.attributes.get("versions"),
    }


def _marks(trace: "Trace") -> dict[str, dict[str, int]]:
    """Each mark's sequences and positions."""
    counted = {name: {"sequences": 0, "positions": 0} for name in trace.mark_names}
    for sequence in trace.sequences:
        for name, spans in trace.marks(sequence).items():
            counted[name]["sequences"] += 1
            counted[name]["positions"] += sum(map(len, spans))
    return counted


def _layer_groups(trace: "Trace") -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for index in trace.layers:
        rules = asdict(trace.layer(index).rules)
        # gpt_neox.layers.3.attention -> gpt_neox.layers.*.attention
        rules["module"] = re.sub(rf"(?<=\.){index}(?=\.|$)", "*", rules["module"])
        sinks = rules.pop("sinks")
        rules["sinks"] = sinks is not None
        rules["output_projection"] = trace.layer(index).has_output_projection
        if groups and all(groups[-1][name] == value for name, value in rules.items()):
            groups[-1]["layers"].append(index)
        else:
            groups.append({"layers": [index], **rules})
    return groups


def _print(facts: dict[str, Any], form: str) -> None:
    model = facts["model"] if isinstance(facts["model"], dict) else {}
    parameters = model.get("parameters")
    finished, planned = facts["sequences"]["finished"], facts["sequences"]["planned"]
    least, most = facts["lengths"]["least"], facts["lengths"]["most"]
    length = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    lines = [
        ("Trace", f"{facts['trace']} (format {facts['format']})"),
        (
            "Model",
            model_name(facts)
            + (f" at {model['revision']}" if model.get("revision") else "")
            + (f", {parameters:,} parameters" if isinstance(parameters, int) else ""),
        ),
        *([("Adapter", _adapter(model["adapter"]))] if model.get("adapter") else []),
        *([("Arguments", _listed(model["arguments"]))] if model.get("arguments") else []),
        *([("Weights", f"digest {model['weights']}")] if model.get("weights") else []),
        ("Task", task_names(facts, sources=True)),
        ("Dtype", facts["dtype"]),
        (
            "Sequences",
            f"{finished} of {planned} finished, {plural(facts['tokens'], 'token')}"
            + (f", {length} each" if finished else ""),
        ),
    ]
    if facts["queries"] != facts["tokens"]:
        lines.append(("Queries", f"{facts['queries']:,} of {facts['tokens']:,} kept"))
    for name, count in facts["marks"].items():
        where = plural(count["sequences"], "sequence")
        lines.append((f"Mark {name}", f"{plural(count['positions'], 'position')} in {where}"))
    lines.append(("Tensors", size(facts["bytes"])))
    if facts["perplexity"] == facts["perplexity"]:
        lines.append(("Perplexity", f"{facts['perplexity']:.2f}"))
    unrecorded = facts["unrecorded_layers"]
    if unrecorded:
        known = isinstance(unrecorded, list) and all(isinstance(i, int) for i in unrecorded)
        lines.append(("Without attention", f"layers {ranges(unrecorded) if known else unrecorded}"))
    if facts["created"]:
        lines.append(("Created", str(facts["created"])))
    for copied in facts["copied"] if isinstance(facts["copied"], list) else ():
        if isinstance(copied, dict):
            lines.append(("Copied from", str(copied.get("trace"))))
    if finished < planned:
        lines.append(("Incomplete", "go on with the command it was made with and --resume"))
    if facts["command"]:
        lines.append(("Command", str(facts["command"])))
    print_facts(lines)
    _print_layers(facts["layers"], form)


def _listed(arguments: object) -> str:
    """How a model was loaded, as --model-args takes it."""
    if not isinstance(arguments, dict):
        return str(arguments)
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def _adapter(facts: Any) -> str:
    """An adapter in words, whatever another writer put there."""
    if not isinstance(facts, dict):
        return str(facts)
    told = ", ".join(
        f"{name} {value}" for name, value in facts.items() if name not in ("adapter", "base")
    )
    return f"{facts.get('adapter')} on {facts.get('base')}" + (f" ({told})" if told else "")


def _print_layers(groups: list[dict[str, Any]], form: str) -> None:
    rules = {
        "window": "Window",
        "chunk": "Chunk",
        "softcap": "Softcap",
        "sinks": "Sinks",
        "cached_bytes": "Cached bytes",
        "indexer": "Keys chosen",
        "output_projection": "W_o",
    }
    shown = [name for name in rules if any(group[name] for group in groups)]
    rows = [
        [
            ranges(group["layers"]),
            group["module"],
            str(group["heads"]),
            str(group["kv_heads"]),
            str(group["key_dim"])
            if group["key_dim"] == group["value_dim"]
            else f"{group['key_dim']}/{group['value_dim']}",
            f"{group['scale']:.6g}",
            *(_rule(group[name]) for name in shown),
        ]
        for group in groups
    ]
    columns = ["Layers", "Module", "Heads", "Kv heads", "Channels", "Scale"]
    columns += [rules[name] for name in shown]
    print_table(columns, rows, left=("Module",), form=form)


def _rule(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, dict):  # an indexer
        source = "" if value["source"] is None else f" (layer {value['source']}'s)"
        return f"{value['kept']}{source}"
    return "-" if value is None else f"{value:g}"
