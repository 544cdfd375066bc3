"""A dataset card of a trace, as data sets on the Hugging Face Hub have it."""

import re
from typing import Any

from retrace.cli.facts import model_name, task_names
from retrace.cli.screen import plural, ranges, size

SIZES = (
    ("n<1K", 1_000),
    ("1K<n<10K", 10_000),
    ("10K<n<100K", 100_000),
    ("100K<n<1M", 1_000_000),
    ("1M<n<10M", 10_000_000),
    ("10M<n<100M", 100_000_000),
    ("100M<n<1B", 1_000_000_000),
    ("1B<n<10B", 10_000_000_000),
    ("10B<n<100B", 100_000_000_000),
    ("100B<n<1T", 1_000_000_000_000),
)
"""The Hub's categories, and what each is less than; `n>1T` from there on. Here n counts tokens."""
TAGS = ("retrace", "attention", "kv-cache", "zarr")
PLACEHOLDER = "OWNER/NAME"


def card(facts: dict[str, Any], name: str, license: str | None = None) -> str:
    """The card, in Markdown with YAML in front.

    Args:
        facts: of the trace, as `retrace info --format json` gives them.
        name: of the trace's folder, as it is in the data set.
        license: the identifier of one, such as apache-2.0; none is named by default, since that of
            the text that was read is not known.
    """
    import yaml

    model = facts["model"] if isinstance(facts["model"], dict) else {}
    title = f"Attention of {model_name(facts)} on {task_names(facts)}"
    front: dict[str, Any] = {} if license is None else {"license": license}
    front |= {
        "pretty_name": title,
        "tags": [*TAGS, *([str(kind)] if (kind := model.get("model_type")) else [])],
        "size_categories": [_category(facts["tokens"])],
    }
    base = model.get("pretrained")
    if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        front["base_model"] = base
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()
    return "\n".join(["---", head, "---", "", f"# {_plain(title)}", "", *_body(facts, name)]) + "\n"


def _category(tokens: int) -> str:
    return next((category for category, most in SIZES if tokens < most), "n>1T")


def _body(facts: dict[str, Any], name: str) -> list[str]:
    sequences = facts["sequences"]["finished"]
    lines = [
        "Queries, keys and values of a language model's attention, as each layer saw them, "
        "recorded by [retrace](https://pypi.org/project/retrace-attention/): methods of "
        "retrieval-based attention are replayed against them without the model.",
        "",
        "| | |",
        "|---|---|",
    ]
    rows = [
        ("Model", model_name(facts)),
        ("Task", task_names(facts, sources=True)),
        ("Sequences", f"{plural(sequences, 'sequence')}, {plural(facts['tokens'], 'token')}"),
        ("Queries", f"{facts['queries']:,} of {facts['tokens']:,}"),
        ("Dtype", facts["dtype"]),
        ("Tensors", size(facts["bytes"])),
        ("Trace format", str(facts["format"])),
    ]
    if facts["perplexity"] == facts["perplexity"]:
        rows.append(("Perplexity", f"{facts['perplexity']:.2f}"))
    rows += [
        (f"Mark {mark}", plural(n["sequences"], "sequence")) for mark, n in facts["marks"].items()
    ]
    lines += [f"| {_plain(what)} | {_plain(value)} |" for what, value in rows]
    lines += [
        "",
        "## Layers",
        "",
        "| Layers | Module | Heads | Kv heads | Key channels | Value channels |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {ranges(group['layers'])} | `{_plain(group['module'])}` | {group['heads']} | "
        f"{group['kv_heads']} | {group['key_dim']} | {group['value_dim']} |"
        for group in facts["layers"]
    ]
    first = facts["layers"][0]["layers"][0] if facts["layers"] else 0
    where = f"hf://datasets/{PLACEHOLDER}/{name}"
    lines += [
        "",
        "## Use",
        "",
        f"With this data set's own name in place of `{PLACEHOLDER}`:",
        "",
        "```python",
        "from retrace.traces import open_trace",
        "",
        f'trace = open_trace("{where}")',
        f"print(trace.layer({first}).key(0).shape)",
        "```",
        "",
        "```sh",
        "pip install retrace-attention",
        f"retrace analyze {where} --method exact --method quest --topk 64",
        "```",
        "",
        "Text that the model read can be told from the token ids.",
    ]
    return lines


def _plain(text: str) -> str:
    """Text of whoever wrote the trace, on one line of a table."""
    return re.sub(r"[|`<>\r\n]", " ", str(text))
