"""What capturing costs beside the forward pass and beside the disk, all in one run.

    python -m benchmarks.speed.capture --model builtin:smollm2 --tokens 1024
    python -m benchmarks.speed.capture --model llama-8b-random --tokens 8192 32768 --device cuda

For each length: the forward pass alone with the model's stock attention, likelihoods included; the
same with every layer's queries, keys and values recorded; and a plain file of as many bytes,
flushed to the disk. The least that a capture could take is the slower of forward and file; the last
column is the capture's time over that. The three are taken in turns, and the median of each
counts. Each figure is of `--sequences` sequences in a row, so that writing one can overlap with
computing the next; everything is on the disk when the clock stops.
"""

import argparse
import os
import resource
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import page
from benchmarks.machine import processor
from retrace.capture.attention.interface import observed_attention
from retrace.capture.attention.recorder import AttentionLayer, RecordedSequence, TensorRecorder
from retrace.capture.checks.trace import examine
from retrace.capture.model.likelihood import next_token_nll
from retrace.capture.recording.queue import WriteQueue
from retrace.traces import create_trace, tensor_bytes
from retrace.traces.queries import parse_queries

Tokens = list[np.ndarray[Any, np.dtype[np.int32]]]


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    torch.manual_seed(0)
    model = _model(arguments)
    vocabulary = model.config.vocab_size
    random = np.random.default_rng(0)
    rows = []
    for length in arguments.tokens:
        tokens = [
            random.integers(0, vocabulary, length).astype(np.int32)
            for _ in range(arguments.sequences)
        ]
        layers = examine(model, tokens[0])
        _forward(model, tokens[:1])  # to warm up
        folder = arguments.folder / "capture-benchmark"
        forwards, captures, disks = [], [], []
        # In turns, since the speed of a disk changes from minute to minute.
        for _ in range(arguments.repeat):
            forwards.append(_forward(model, tokens))
            seconds, size = _recorded(model, layers, tokens, arguments.queries, folder)
            captures.append(seconds)
            disks.append(_plain(arguments.folder, size))
        forward, capture, disk = map(statistics.median, (forwards, captures, disks))
        rows.append((length, forward, capture, size, disk))
        print(f"{length} tokens: {forward:.2f} s, {capture:.2f} s, {size / disk / 1e6:.0f} MB/s")
    page.publish(_table(rows, model, arguments), arguments.out)


def _parse() -> argparse.Namespace:
    parser = page.parser(__doc__)
    parser.add_argument("--model", default="builtin:smollm2", help="or llama-8b-random")
    parser.add_argument("--layers-in-model", type=int, default=32, help="of llama-8b-random")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--queries", default="all", help="that are recorded, as in retrace capture")
    parser.add_argument("--sequences", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of a model that is loaded")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure")
    parser.add_argument("--repeat", type=int, default=3, help="the median counts")
    return parser.parse_args()


def _model(arguments: argparse.Namespace) -> Any:
    if arguments.model != "llama-8b-random":
        from retrace.capture.model.loading import open_checkpoint
        from retrace.capture.settings import CaptureSettings

        settings = CaptureSettings(pretrained=arguments.model, tasks=("wikitext",))
        return open_checkpoint(settings).load(arguments.dtype, arguments.device)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=arguments.layers_in_model,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(arguments.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _forward(model: Any, tokens: Tokens) -> float:
    begun = time.perf_counter()
    with torch.inference_mode():
        for sequence in tokens:
            next_token_nll(model, torch.from_numpy(sequence).long()[None].to(model.device))
    return time.perf_counter() - begun


def _recorded(
    model: Any, layers: dict[int, AttentionLayer], tokens: Tokens, queries: str, folder: Path
) -> tuple[float, int]:
    """(seconds, bytes) of a capture of these sequences, without the checks of the first one."""
    shutil.rmtree(folder, ignore_errors=True)
    select = parse_queries(queries)
    positions = [select.positions(len(sequence)) for sequence in tokens]
    rules = {index: layer.rules for index, layer in layers.items()}
    dtype = str(next(iter(layers.values())).dtype).removeprefix("torch.")
    plan: dict[str, Any] = {"rules": rules, "tokens": tokens, "query_positions": positions}
    writer = create_trace(folder, dtype=dtype, attributes={}, **plan)
    begun = time.perf_counter()
    with WriteQueue(writer) as queue, torch.inference_mode():
        recorder = TensorRecorder(queue, layers)
        with observed_attention(model, recorder):
            for s, sequence in enumerate(tokens):
                recorder.start([RecordedSequence(0, s, len(sequence), positions[s])])
                batch = torch.from_numpy(sequence).long()[None].to(model.device)
                nll = next_token_nll(model, batch)
                recorder.finish()
                queue.finish_sequence(s, nll[0].numpy())
    seconds = time.perf_counter() - begun
    shutil.rmtree(folder)
    return seconds, tensor_bytes(rules, tokens, positions, dtype)


def _plain(folder: Path, size: int) -> float:
    """Seconds to write a plain file of so many bytes and to flush it to the disk."""
    path = folder / "capture-benchmark.bin"
    block = memoryview(os.urandom(1 << 26))
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def _table(rows: list[Any], model: Any, arguments: argparse.Namespace) -> str:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    device = processor(arguments.device)
    if arguments.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**30
        device += f", {peak:.1f} GiB of it used at most"
    parameters = sum(p.numel() for p in model.parameters()) / 1e9
    lines = [
        f"{arguments.model} ({parameters:.2f} billion parameters, {model.dtype}), {device}, "
        f"{os.cpu_count()} cores, {host:.1f} GiB of host memory used at most, torch "
        f"{torch.__version__}. Seconds for {arguments.sequences} sequences; queries: "
        f"{arguments.queries}.",
        "",
        "| tokens | forward alone | capture | GB written | disk MB/s | capture / the slower |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for length, forward, capture, size, disk in rows:
        lines.append(
            f"| {length:,} | {forward:.2f} | {capture:.2f} | {size / 1e9:.2f} | "
            f"{size / disk / 1e6:,.0f} | {capture / max(forward, disk):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
