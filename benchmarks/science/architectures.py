"""Which architectures retrace records, each tried on a tiny random model of its own.

    python -m benchmarks.science.architectures --out docs/architectures.md

Builds a model of every family, captures it as a user would, recomputes the attention output of
every recorded layer in float64 from the trace alone, and compares it with what the model's own
plain ("eager") attention gave in a run that retrace takes no part in. Exits with 1 where one
differs. `tests/capture` runs the same matrix, of every causal language model of transformers.
"""

import contextlib
import functools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks import page
from benchmarks.tiny_architectures import ARCHITECTURES, NOT_TRIED
from benchmarks.tiny_models import TEXT, model_class, save_tiny_model
from retrace.analyze.units.attention import attend
from retrace.capture import capture
from retrace.traces import LayerRules, RetraceError, Trace, to_torch

TOLERANCE = 1e-4
"""Largest difference that counts as equal, relative to a layer's typical output."""
LENGTH = 50


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture."""

    model_type: str
    layers: int
    """Layers of the model, with attention or without."""
    rules: tuple[LayerRules, ...] = ()
    """Of the recorded layers; none where the model was refused."""
    error: float = float("nan")
    """Largest difference of a query's output, relative to the layer's typical output."""
    sensitivity: float = float("nan")
    """The same, had the scale been 5 % off: what `error` would miss if it were small as well."""
    refusal: str = ""
    decodes: bool | None = None
    """Whether `--generate` records it; None where that was not tried."""


def plain_outputs(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Output (positions, heads, value channels) of the model's own plain attention for token ids
    (positions,), in float64, by the path of the attention module."""
    model: Any = (
        model_class(AutoConfig.from_pretrained(folder))
        .from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    paths = {module: path for path, module in model.named_modules()}
    outputs: dict[str, Tensor] = {}
    with contextlib.ExitStack() as patches, torch.inference_mode():
        for namespace in {type(m).__module__ for m in model.modules()}:
            if hasattr(sys.modules[namespace], "eager_attention_forward"):
                patches.enter_context(_noting(sys.modules[namespace], paths, outputs))
        model(tokens.long()[None], use_cache=False)
    return outputs


@contextlib.contextmanager
def _noting(namespace: Any, paths: dict[Any, str], outputs: dict[str, Tensor]) -> Iterator[None]:
    """The plain attention of a module of transformers also puts down what it gives."""
    plain = namespace.eager_attention_forward

    @functools.wraps(plain)
    def noting(module: Any, *inputs: Any, **options: Any) -> Any:
        result = plain(module, *inputs, **options)
        outputs[paths[module]] = result[0][0].double()
        return result

    namespace.eager_attention_forward = noting
    try:
        yield
    finally:
        namespace.eager_attention_forward = plain


def replayed(trace: Trace, sequence: int, index: int, scale: float = 1.0) -> Tensor:
    """A layer's attention output (queries, heads, value channels) in float64, from the trace alone;
    `scale` multiplies its scores, to see whether that would be noticed."""
    layer = trace.layer(index)
    rules = layer.rules
    positions = torch.from_numpy(layer.query_positions(sequence)).long()
    queries, keys, values = (
        to_torch(tensor).double()
        for tensor in (layer.query(sequence), layer.key(sequence), layer.value(sequence))
    )
    outputs = []
    for kv_head in range(rules.kv_heads):
        heads = slice(kv_head * rules.group, (kv_head + 1) * rules.group)
        sinks = None if rules.sinks is None else torch.tensor(rules.sinks[heads]).double()
        chosen = None
        if rules.indexer is not None:
            choices = torch.from_numpy(layer.selected(sequence)).long()
            chosen = choices[kv_head if len(choices) > 1 else 0]
        group = queries[heads] * scale, keys[kv_head], values[kv_head]
        outputs.append(attend(*group, positions, rules, sinks, chosen))
    return torch.cat(outputs).transpose(0, 1)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a head's output, relative to the typical norm of `expected`; both
    (queries, heads, value channels)."""
    typical = expected.norm(dim=-1).square().mean().sqrt()
    return float((found - expected).norm(dim=-1).max() / typical)


def try_architecture(model_type: str, folder: Path) -> Outcome:
    """Capture a tiny model of this architecture in `folder`, and compare trace and model."""
    save_tiny_model(model_type, folder / "model")
    text = folder / "birds.txt"
    text.write_text(TEXT, encoding="utf-8")
    config = (
        CONFIG_MAPPING[model_type].from_pretrained(folder / "model").get_text_config(decoder=True)
    )
    layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    try:
        trace = capture(
            str(folder / "model"),
            text=[text],
            limit=1,
            max_length=LENGTH,
            dtype="float32",
            out=folder / "trace.zarr",
        )
    except RetraceError as error:
        assert not (folder / "trace.zarr").exists()
        refusal = str(error).replace(str(folder / "model"), model_type)
        return Outcome(model_type, layers, refusal=refusal)
    expected = plain_outputs(folder / "model", torch.from_numpy(trace.tokens(0)))
    rules = [trace.layer(index).rules for index in trace.layers]
    assert {rule.module for rule in rules} == set(expected), (rules, set(expected))
    errors, moved = [], []
    for index, rule in zip(trace.layers, rules, strict=True):
        errors.append(difference(replayed(trace, 0, index), expected[rule.module]))
        moved.append(difference(replayed(trace, 0, index, 1.05), expected[rule.module]))
    return Outcome(
        model_type,
        layers,
        tuple(rules),
        error=float(torch.tensor(errors).max()),  # NaN stays NaN
        sensitivity=float(torch.tensor(moved).min()),
    )


def can_decode(folder: Path) -> bool:
    """Whether the model that was captured in `folder` is captured with generated tokens as well:
    retrace refuses one that does not decode what it gives in one pass."""
    try:
        capture(
            str(folder / "model"),
            text=[folder / "birds.txt"],
            limit=1,
            max_length=LENGTH,
            generate=8,
            dtype="float32",
            out=folder / "decoded.zarr",
        )
    except RetraceError:
        return False
    return True


def main() -> int:
    """Try the architectures, print their table, and write the page where asked."""
    parser = page.parser(__doc__)
    parser.add_argument("model_types", nargs="*", help="architectures to try; all by default")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = []
    for model_type in arguments.model_types or sorted(ARCHITECTURES):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = try_architecture(model_type, Path(folder))
            if not outcome.refusal:
                outcome = replace(outcome, decodes=can_decode(Path(folder)))
            outcomes.append(outcome)
        print(_row(outcomes[-1]), file=sys.stderr)
    page.publish(_page(outcomes, {} if arguments.model_types else NOT_TRIED), arguments.out)
    return int(any(not outcome.refusal and not outcome.error <= TOLERANCE for outcome in outcomes))


def _page(outcomes: list[Outcome], not_tried: dict[str, str]) -> str:
    recorded = [outcome for outcome in outcomes if not outcome.refusal]
    refused = [outcome for outcome in outcomes if outcome.refusal]
    lines = [
        "# Architectures",
        "",
        "Made by `python -m benchmarks.science.architectures --out docs/architectures.md` with "
        f"transformers {transformers.__version__} and PyTorch {torch.__version__.split('+')[0]}; "
        "the test suite checks the same matrix.",
        "",
        "A tiny random model of each architecture, with weights large enough for attention to be "
        "far from uniform, is captured as any model is. The attention output of every recorded "
        "layer is then recomputed in float64 from the trace alone, and compared with what the "
        "model's own plain attention gave in a run that retrace takes no part in. *Difference* is "
        "the largest one of any head and query, relative to the layer's typical output; a scale "
        f"5 % off would make it {min((o.sensitivity for o in recorded), default=0):.0e} or more. "
        "*Rotation* says which channels a "
        "layer's position encoding was found to turn, and how these are paired: queries and keys "
        "are stored turned, and read back as they were before by `rotated=False`. "
        "*Decoding* says whether `--generate` records what the model decodes: retrace compares "
        "decoded logits with those of one pass, and refuses a model whose differ. "
        "Every model type that transformers loads as a causal language model has a row, and some "
        "vision-language models have one. Models whose code comes with their checkpoint are "
        "recorded as well where it uses transformers' attention interface: every capture checks "
        "itself in the same way on its first sequence.",
        "",
        f"## Recorded ({len(recorded)})",
        "",
        "| Architecture | Layers | Heads | Kv heads | Channels | Rules | Rotation | Decoding "
        "| Difference |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_row, recorded),
    ]
    if refused:
        lines += [
            "",
            f"## Refused ({len(refused)})",
            "",
            "Before anything is written, with this line. Models with attention code of their own "
            "cannot be observed; among them are all that bias scores by distance (ALiBi: bloom, "
            "mpt, falcon). The position bias of inkling is computed anew from each query's "
            "hidden state, and is added to scores that queries and keys do not give. Models that "
            "run their layers in a loop (dory, hrm_text) attend more than once for a token. The "
            "decoder of bigbird_pegasus says that it is not causal, and is so only by the mask of "
            "its plain attention. transformers' class for the language model of emu3 does not find "
            "its weights in a whole checkpoint as transformers writes it.",
            "",
            "| Architecture | Refusal |",
            "|---|---|",
            *map(_row, refused),
        ]
    if not_tried:
        lines += [
            "",
            f"## Not tried ({len(not_tried)})",
            "",
            "| Architecture | Reason |",
            "|---|---|",
            *(f"| {model_type} | {reason} |" for model_type, reason in not_tried.items()),
        ]
    return "\n".join(lines)


def _row(outcome: Outcome) -> str:
    if outcome.refusal:
        return f"| {outcome.model_type} | {outcome.refusal} |"
    rules = outcome.rules
    dims = [
        f"{r.key_dim}" if r.key_dim == r.value_dim else f"{r.key_dim}/{r.value_dim}" for r in rules
    ]
    cells = [
        outcome.model_type,
        f"{len(rules)} of {outcome.layers}",
        _distinct([r.heads for r in rules]),
        _distinct([r.kv_heads for r in rules]),
        _distinct(dims),
        ", ".join(_named(rules)),
        _distinct([_encoding(r) for r in rules]),
        "not tried" if outcome.decodes is None else "yes" if outcome.decodes else "no",
        f"{outcome.error:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def _named(rules: tuple[LayerRules, ...]) -> Iterator[str]:
    """The rules that a layer of this architecture may have, in words."""
    yield f"scale {_distinct([f'{r.scale:.3g}' for r in rules])}"
    for name in ("window", "chunk", "softcap"):
        values = [getattr(r, name) for r in rules]
        if any(value is not None for value in values):
            yield f"{name} {_distinct(['-' if v is None else f'{v:g}' for v in values])}"
    if any(r.sinks is not None for r in rules):
        yield "sinks"
    if any(r.indexer is not None for r in rules):
        kept = [r.indexer.kept for r in rules if r.indexer is not None]
        yield f"chooses {_distinct(kept)} keys"
        sources = [r.indexer.source for r in rules if r.indexer and r.indexer.source is not None]
        if sources:
            yield f"as layer {_distinct(sources)} did"
    if any(r.kv_source is not None for r in rules):
        yield f"keys of layer {_distinct([r.kv_source for r in rules if r.kv_source is not None])}"


def _encoding(rules: LayerRules) -> str:
    """What a layer's rotation is, in words."""
    if rules.rotation is None:
        return "not known"
    if not rules.rotation.frequencies:
        return "none"
    rotated = 2 * len(rules.rotation.frequencies)
    part = "" if rotated == rules.key_dim else f" {rotated} of {rules.key_dim}"
    return f"{rules.rotation.pairing}{part}"


def _distinct(values: list[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


if __name__ == "__main__":
    sys.exit(main())
