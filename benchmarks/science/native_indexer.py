"""A natively sparse model of DeepSeek-V3.2's shape, trained here, and how well its indexer chooses.

    python -m benchmarks.science.native_indexer --train valid.txt --test test.txt

A small model learns bytes of real text with full attention. Beside it its indexers learn, by the
Kullback-Leibler divergence from the attention of their layer, summed over heads, which is the first
stage of DeepSeek-V3.2's own training (arXiv:2512.02556, section 2.1.1); then both go on with the
keys that the indexer chooses, which is its second. What the model chose on text that it has not
seen is held against other methods at the same budget, and its likelihood against that with full
attention.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb

from benchmarks.page import origin, parser, publish
from benchmarks.tiny_models import byte_tokenizer
from retrace.analyze import Results, analyze
from retrace.capture import capture
from retrace.traces import Trace

LENGTH, KEPT = 256, 16
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "mlp_layer_types": ["dense"] * 3,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
METHODS = ["native", "exact", "quest:page=8", "mean-page:page=8", "window", "random"]


def main() -> None:
    """Train, capture, replay, and print the page."""
    arguments = _arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tokens = torch.tensor(byte_tokenizer()(_text(arguments.train)).input_ids)
        model, log = train(tokens, arguments.steps, arguments.batch_size)
        model.save_pretrained(place / "model")
        byte_tokenizer().save_pretrained(place / "model")
        text = place / "test.txt"
        text.write_text(_text(arguments.test)[: 20 * LENGTH], encoding="utf-8")
        options: dict[str, Any] = {"dtype": "float32", "batch_size": 4}
        trace = capture(
            str(place / "model"),
            text=[text],
            limit=12,
            max_length=LENGTH,
            out=place / "own.zarr",
            **options,
        )
        full = capture(
            reference=str(trace.path), approximate="dense", topk=KEPT, out=place / "full.zarr"
        )
        results = analyze(trace, METHODS, [KEPT], min_context=LENGTH // 2)
        publish(_page(arguments, log, trace, full, results), arguments.out)


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--train", type=Path, required=True, help="text to learn from")
    arguments.add_argument("--test", type=Path, required=True, help="text to judge by")
    arguments.add_argument("--steps", type=int, default=1000, help="with full attention")
    arguments.add_argument("--batch-size", type=int, default=8)
    return arguments.parse_args()


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def train(tokens: Tensor, steps: int, batch_size: int) -> tuple[Any, dict[str, float]]:
    """A model that has learnt from tokens (positions,), with indexers that have learnt its
    attention; and what there is to tell of it."""
    options: dict[str, Any] = {**SHAPE, "index_topk": LENGTH, "use_cache": False}
    config = CONFIG_MAPPING["deepseek_v32"](**options)
    loader: Any = AutoModelForCausalLM
    model: Any = loader.from_config(config, attn_implementation="eager")
    indexers = [p for name, p in model.named_parameters() if ".indexer." in name]
    others = [p for name, p in model.named_parameters() if ".indexer." not in name]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": indexers}], lr=2e-3)
    sparse_steps = steps // 4
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps + sparse_steps)
    log = {"seconds": -time.monotonic()}
    for step, batch in enumerate(_batches(tokens, steps + sparse_steps, batch_size)):
        sparse = step >= steps
        _choose(model, KEPT if sparse else LENGTH)
        with _watched(model) as seen:
            loss = model(input_ids=batch, labels=batch).loss
        learnt = torch.stack([_divergence(module, *of) for module, of in seen.items()]).mean()
        optimizer.zero_grad()
        (loss + learnt).backward()  # of each other's parameters they depend on none
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in (steps - 1, steps + sparse_steps - 1):
            stage = "sparse" if sparse else "full"
            log |= {f"{stage} loss": loss.item(), f"{stage} divergence": learnt.item()}
    log["seconds"] += time.monotonic()
    return model.eval(), log


def _batches(tokens: Tensor, count: int, size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        starts = torch.randint(len(tokens) - LENGTH, (size,), generator=generator)
        yield torch.stack([tokens[start : start + LENGTH] for start in starts])


def _choose(model: Any, kept: int) -> None:
    model.config.index_topk = kept
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = kept


class _watched:
    """Within this context, what each attention module is given and the attention that it gives."""

    def __init__(self, model: Any) -> None:
        self._modules = [layer.self_attn for layer in model.model.layers]
        self._seen: dict[Any, tuple[Tensor, Any, Tensor]] = {}

    def __enter__(self) -> dict[Any, tuple[Tensor, Any, Tensor]]:
        self._hooks = [m.register_forward_hook(self._note, with_kwargs=True) for m in self._modules]
        return self._seen

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: Any, inputs: Any, options: dict[str, Any], output: Any) -> None:
        hidden = options["hidden_states"] if "hidden_states" in options else inputs[0]
        self._seen[module] = hidden.detach(), options["position_embeddings"], output[1].detach()


def _divergence(module: Any, hidden: Tensor, places: Any, attention: Tensor) -> Tensor:
    """KL of the indexer's softmax from the layer's attention (batch, heads, queries, keys), summed
    over heads and of sum 1; of later stages over the keys that are attended."""
    with torch.no_grad():
        latent = module.q_a_layernorm(module.q_a_proj(hidden))
        target = attention.mean(dim=1)
    scores = index_scores(module.indexer, hidden, latent, *places)
    seen = target > 0
    log_own = scores.masked_fill(~seen, -torch.inf).log_softmax(dim=-1)
    apart = target * (target.clamp(min=1e-9).log() - log_own.masked_fill(~seen, 0.0))
    return apart.sum(dim=-1).mean()


def index_scores(indexer: Any, hidden: Tensor, latent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What an indexer gives each key for each query (batch, queries, keys): the weighted sum over
    its heads of ReLU(q.k), as the model has it, with gradients."""
    rotated = indexer.qk_rope_head_dim
    queries = indexer.wq_b(latent).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    keys = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
    turned_queries, turned_keys = apply_rotary_pos_emb(
        queries[..., :rotated], keys[..., :rotated], cos, sin, unsqueeze_dim=2
    )
    queries = torch.cat([turned_queries, queries[..., rotated:]], dim=-1)
    keys = torch.cat([turned_keys, keys[..., rotated:]], dim=-1).squeeze(2)
    products = torch.einsum("bqhc,bkc->bqhk", queries, keys) * indexer.softmax_scale
    weights = indexer.weights_proj(hidden) * indexer.n_heads**-0.5
    return torch.einsum("bqh,bqhk->bqk", weights, products.relu())


def _page(
    arguments: argparse.Namespace,
    log: dict[str, float],
    trace: Trace,
    full: Trace,
    results: Results,
) -> str:
    rows = results.metrics.astype({"method": str, "metric": str})
    means = rows.pivot_table("mean", "method", "metric").loc[METHODS]
    lines = [
        origin(),
        "",
        f"{arguments.steps} steps of {arguments.batch_size} x {LENGTH} bytes with full attention, "
        f"{arguments.steps // 4} with {KEPT} keys of the indexer's choice: {log['seconds']:.0f} s. "
        f"Loss {log['full loss']:.3f}, then {log['sparse loss']:.3f} nats; divergence of the "
        f"indexer {log['full divergence']:.3f}, then {log['sparse divergence']:.3f}.",
        "",
        f"Perplexity per byte of unseen text: {trace.perplexity():.3f}, with full attention "
        f"{full.perplexity():.3f}.",
        "",
        "| method | recall | attention fraction | error norm | density | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in means.iterrows():
        names = ("recall", "attention_fraction", "error_norm", "density", "bytes_ratio")
        lines.append(f"| `{method}` | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    layers = rows[(rows["method"] == "native") & rows["metric"].isin(["recall", "error_norm"])]
    table = layers.pivot_table("mean", "layer", "metric")
    lines += ["", "| layer | recall of native | error norm |", "|---|---|---|"]
    lines += [f"| {i} | {r['recall']:.3f} | {r['error_norm']:.3f} |" for i, r in table.iterrows()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
