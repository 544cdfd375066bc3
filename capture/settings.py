"""What a capture is asked to do."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrace.analyze.plans.plan import PLAN
from retrace.analyze.units.protocol import Protocol
from retrace.capture.model.arguments import (
    DeviceMap,
    ModelArguments,
    check_together,
    parse_device_map,
    parse_model_args,
)
from retrace.traces import Location, RetraceError, locate
from retrace.traces.errors import did_you_mean
from retrace.traces.queries import parse_queries

TASKS = ("wikitext", "needle")
"""Tasks that need no lm-eval-harness; `retrace.capture.reading.tasks` says what each is."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Settings of a capture, checked when made.

    Raises:
        RetraceError: a setting that cannot be, or two that contradict each other.
    """

    pretrained: str = ""
    """Model: a Hugging Face Hub id, a local folder, a .gguf file, or builtin:smollm2; by default
    that of the reference."""
    reference: str | Path | None = None
    """A trace whose tokens the model reads in place of tasks or text; model, type, batch size,
    layers and queries are as in it unless given."""
    tasks: Sequence[str] = ()
    """Tasks whose text the model reads: wikitext, needle (needles in a haystack, of any length), or
    any of lm-eval-harness, such as hellaswag."""
    text: Sequence[str | Path] = ()
    """Text files (UTF-8) that the model reads, cut into consecutive sequences; of .jsonl, .json,
    .csv, .tsv and .parquet files the `text` of each row is a text."""
    prompts: Sequence[str | Path] = ()
    """Files (.jsonl, ...) of which each row is read whole: a `text`, a `prompt` with a `completion`
    that is scored, or the `messages` of a chat; `spans` name what is marked in it."""
    data: str | Path | None = None
    """Local file or folder (.txt, .jsonl, .parquet, ...) to read the documents of wikitext, or the
    haystack of needle, from."""
    lengths: Sequence[int] = ()
    """Tokens of the prompts of needle, generated ones not included; by default max_length."""
    depths: Sequence[int] = (0, 25, 50, 75, 100)
    """Where needle hides its needle, in per cent of the haystack: a prompt of each length for
    each."""
    include_path: str | Path | None = None
    """Folder of further task files (.yaml) for lm-eval-harness."""
    num_fewshot: int | None = None
    """Solved examples before each document of a task of lm-eval-harness; by default what the task
    says."""
    metadata: Mapping[str, Any] | None = None
    """What tasks of lm-eval-harness are told besides, as JSON: '{"max_seq_lengths": [4096]}' for
    those of RULER. The model's tokenizer is handed to them."""
    apply_chat_template: bool = False
    """Texts, prompts and tasks are what a user says in a chat of the model; messages always are
    written by its chat template."""
    system_instruction: str | None = None
    """What the system says first, in a chat or before the prompts of files and tasks."""
    fewshot_as_multiturn: bool | None = None
    """Solved examples are turns of the chat, not one message; by default they are in a chat."""
    limit: int | None = None
    """Sequences of wikitext, needle and each text file, rows of each file of prompts, documents of
    each task of lm-eval-harness (a document may make several sequences); all of them by default."""
    generate: int = 0
    """Tokens by which the model continues each prompt, document and text, recorded as they are
    decoded; answers that are scored are not continued."""
    temperature: float = 0.0
    """Generated tokens are drawn from probabilities with logits divided by this; 0 takes the
    likeliest."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest of this much probability together."""
    seed: int = 0
    """Of what is drawn: tokens, and what needle hides."""
    stop: Sequence[str] = ()
    """Texts that end a sequence where the model has written one of them; its tokens are kept."""
    batch_size: int = 1
    """Sequences that the model reads at once."""
    max_length: int | None = None
    """Tokens of a sequence at most, generated ones included; by default 2048, or the model's
    maximum where that is less."""
    dtype: str = "auto"
    """Type that the model computes in and the trace stores: auto is the checkpoint's own."""
    device: str = "auto"
    """Device that runs the model: auto is cuda where there is one, else cpu."""
    device_map: str | Path | Mapping[str, Any] | None = None
    """Spread the model over several devices: auto, balanced or sequential fill the GPUs, then the
    CPU, then the disk; cpu; or a JSON object, or file of one, that names a device for each module.
    By default the model is on one device."""
    model_args: str | Mapping[str, Any] | None = None
    """Further arguments of the model as lm-evaluation-harness takes them, key=value,... or a JSON
    object: load_in_4bit, load_in_8bit, bnb_4bit_*, peft (an adapter), subfolder, revision,
    max_memory_per_gpu, offload_folder, and what else transformers loads or configures it by."""
    layers: Sequence[int] | None = None
    """Layers to record; all of them by default."""
    queries: str = "all"
    """Queries to keep: all, last:N of each sequence, or stride:N (every N-th, the last included).
    The last 64 of the prompt are kept besides, keys and values always whole."""
    approximate: str | None = None
    """A method, such as quest:page=32, that computes attention in place of exact attention; or
    plan:FILE, a method and budget for every kv head, as recommend writes it."""
    topk: int | None = None
    """Budget of the method: keys per query and head."""
    protocol: str | None = None
    """Queries of a prompt that the method answers together: prefill:B, blocks of B, or
    prefill:B:chunk=C where C queries are read at once. Decoded ones attend exactly. By default each
    query is answered alone."""
    from_position: int | None = None
    """Positions before it attend exactly; by default none do, or with generate those that are not
    generated."""
    dense_layers: Sequence[int] = ()
    """Layers that attend exactly."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    trust_remote_code: bool = False
    """Run the Python code that a model on the Hub or in a folder brings along."""
    out: str | Path | None = None
    """Where the trace goes, a path or a URL (s3://bucket/t.zarr); traces/<model>-<task>.zarr by
    default."""
    overwrite: bool = False
    """Replace an existing trace, once the new one is complete."""
    resume: bool = False
    """Go on with an interrupted trace; starts one where there is none."""

    def __post_init__(self) -> None:
        self._settle_loading()
        for name in ("tasks", "text", "prompts", "stop"):
            if isinstance(getattr(self, name), str):
                raise RetraceError(f"{name} must be a list, not one string.")
        if not self.pretrained and self.reference is None:
            raise RetraceError("No model is named: --pretrained MODEL.")
        self._check_reference()
        self._check_approximation()
        if not (self.tasks or self.text or self.prompts) and self.reference is None:
            raise RetraceError(
                f"Nothing to read: name a task (such as {TASKS[0]}), a text file (--text FILE) or "
                "a file of prompts (--prompts FILE)."
            )
        for task in self.harness_tasks():
            _check_harness(task)
        for path in self.text:
            if not Path(path).is_file():
                raise RetraceError(f"There is no text file {path}.")
        for path in self.prompts:
            if not Path(path).is_file():
                raise RetraceError(f"There is no file of prompts {path}.")
        self._check_data()
        self._check_harness_settings()
        self._check_chat()
        self._check_needle()
        self._check_sampling()
        least_of = {"limit": 1, "batch_size": 1, "max_length": 2, "num_fewshot": 0, "generate": 0}
        least_of |= {"topk": 1, "from_position": 1, "seed": 0}
        for name, least in least_of.items():
            number = getattr(self, name)
            if number is not None and number < least:
                raise RetraceError(f"{name} must be at least {least}, not {number}.")
        if self.dtype not in DTYPES:
            raise RetraceError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise RetraceError("layers must name at least one layer, counted from 0.")
        parse_queries(self.queries)
        if self.overwrite and self.resume:
            raise RetraceError("overwrite and resume contradict each other: give one of them.")

    def _settle_loading(self) -> None:
        """Read what says how the model is loaded, in whatever form it was given."""
        arguments = None if self.model_args is None else parse_model_args(self.model_args)
        device_map = None if self.device_map is None else parse_device_map(self.device_map)
        check_together(arguments, device_map)
        revision = (arguments or {}).pop("revision", self.revision)
        if self.revision is not None and revision != self.revision:
            raise RetraceError(
                f"The revision is {self.revision} and, in model_args, {revision}: leave one out."
            )
        if device_map is not None and self.device != "auto":
            raise RetraceError(
                f"device puts the model on {self.device}, and device_map spreads it: leave one out."
            )
        # Frozen for all others: it stays what it was made as.
        object.__setattr__(self, "model_args", arguments or None)
        object.__setattr__(self, "device_map", device_map)
        object.__setattr__(self, "revision", revision)

    def _check_reference(self) -> None:
        if self.reference is None:
            return
        given = [
            name
            for name in ("tasks", "text", "prompts", "generate", "max_length")
            if getattr(self, name)
        ]
        if given:
            raise RetraceError(
                f"{given[0]} says what the model reads, and so does reference: leave one out."
            )

    def _check_approximation(self) -> None:
        if self.approximate is None:
            for name in ("topk", "protocol", "from_position", "dense_layers"):
                if getattr(self, name):
                    raise RetraceError(f"{name} is for a method: name it in approximate.")
            return
        if self.prefill is not None:
            if self.prefill.block is None:
                raise RetraceError(
                    f"protocol {self.protocol!r}: a method in the loop takes prefill:B, or none, "
                    "where it answers queries as they come (see from_position)."
                )
            if self.from_position is not None:
                raise RetraceError(
                    "from_position is for queries that come one by one, and protocol for blocks of "
                    "them from the first on: leave one out."
                )
            if self.batch_size > 1:
                raise RetraceError(
                    "batch_size must be 1 with protocol: where the end of a prompt is looked at, "
                    "that is its own, not that of the longest of a batch."
                )
        if self.topk is None and not self.approximate.startswith(PLAN):
            raise RetraceError(f"How many keys may {self.approximate} attend? Say so with topk.")

    def _check_data(self) -> None:
        if self.data is None:
            return
        if len(self.tasks) != 1 or self.tasks[0] not in TASKS:
            raise RetraceError(
                "data says where the documents of one task are: give one task with it "
                f"({', '.join(TASKS)}), or read plain text with --text FILE. Tasks of "
                "lm-eval-harness name their data in task files: --include-path FOLDER."
            )
        if not Path(self.data).exists():
            raise RetraceError(f"There is no data file or folder {self.data}.")

    def _check_harness_settings(self) -> None:
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise RetraceError(f"There is no folder of task files {self.include_path}.")
        if self.metadata is not None and not isinstance(self.metadata, Mapping):
            raise RetraceError("metadata must be a mapping of names to values.")
        for name in ("include_path", "num_fewshot", "metadata"):
            if getattr(self, name) is not None and not self.harness_tasks():
                raise RetraceError(
                    f"{name} is for tasks of lm-eval-harness: name one in tasks, or leave it out."
                )

    def _check_chat(self) -> None:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise RetraceError(
                "fewshot_as_multiturn makes turns of a chat: give apply_chat_template with it."
            )
        if self.fewshot_as_multiturn is not None and not self.harness_tasks():
            raise RetraceError(
                "fewshot_as_multiturn is for tasks of lm-eval-harness: name one in tasks, or leave "
                "it out."
            )
        read = self.prompts or self.harness_tasks() or "needle" in self.tasks
        for name in ("apply_chat_template", "system_instruction"):
            if getattr(self, name) and not read:
                raise RetraceError(
                    f"{name} is for prompts, needle and tasks of lm-eval-harness: wikitext and "
                    "plain text are read as they are."
                )

    def _check_needle(self) -> None:
        given = [n for n in ("lengths", "depths") if getattr(self, n) != getattr(type(self), n)]
        if given and "needle" not in self.tasks:
            raise RetraceError(f"{given[0]} is for the task needle: name it in tasks.")
        if any(not 0 <= depth <= 100 for depth in self.depths) or not self.depths:
            raise RetraceError("depths must be per cent of the haystack, from 0 to 100.")
        if any(length < 2 for length in self.lengths):
            raise RetraceError("lengths must be tokens of a prompt, at least 2.")

    def _check_sampling(self) -> None:
        for name in ("temperature", "stop"):
            if getattr(self, name) and not self.generate:
                raise RetraceError(f"{name} is for what the model writes: give generate with it.")
        if not 0 <= self.temperature <= 100:
            raise RetraceError(f"temperature must be from 0 to 100, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise RetraceError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.top_p < 1 and not self.temperature:
            raise RetraceError("top_p is for tokens that are drawn: give a temperature with it.")
        if self.seed and not self.temperature and "needle" not in self.tasks:
            raise RetraceError(
                "seed is for tokens that are drawn (temperature) and for the task needle."
            )
        if not all(self.stop):
            raise RetraceError("stop must be texts of at least one character.")

    @property
    def prefill(self) -> Protocol | None:
        """Which queries of a prompt the method answers together, if any."""
        return None if self.protocol is None else Protocol.parse(self.protocol)

    @property
    def arguments(self) -> ModelArguments:
        """Arguments of the model, by name."""
        assert not isinstance(self.model_args, str)
        return dict(self.model_args or {})

    @property
    def spread(self) -> DeviceMap | None:
        """How the model is spread over devices, if it is."""
        assert not isinstance(self.device_map, Path)
        return self.device_map if isinstance(self.device_map, str | None) else dict(self.device_map)

    def harness_tasks(self) -> list[str]:
        """The tasks that lm-eval-harness reads."""
        return [task for task in self.tasks if task not in TASKS]

    def told_lengths(self) -> list[int]:
        """Tokens that prompts of tasks are to have, as lengths and metadata tell them."""
        told = (self.metadata or {}).get("max_seq_lengths", ())
        told = told if isinstance(told, list | tuple) else ()
        return [*self.lengths, *(n for n in told if type(n) is int)]

    def output(self) -> Location:
        """Where the trace goes."""
        if self.out is not None:
            return locate(self.out)
        model = Path(self.pretrained.removeprefix("builtin:")).name.removesuffix(".gguf")
        read = [*self.tasks, *(Path(path).stem for path in (*self.text, *self.prompts))]
        name = f"{_slug(model)}-{_slug('-'.join(read))}"
        if self.reference is not None:
            name = _slug(locate(self.reference).stem)
        if self.approximate is not None:
            named = f"{self.approximate}-{self.topk}"
            if self.approximate.startswith(PLAN):
                named = f"plan-{Path(self.approximate.removeprefix(PLAN)).stem}"
            name += f"-{_slug(named)}"
            name += "" if self.protocol is None else f"-{_slug(self.protocol)}"
        return Path("traces") / f"{name}.zarr"


def _check_harness(name: str) -> None:
    """Refuse a task of lm-eval-harness where that is not installed."""
    if importlib.util.find_spec("lm_eval") is not None:
        return
    guess = did_you_mean(name, TASKS)
    raise RetraceError(
        f"There is no task {name!r} without lm-eval-harness.{guess} Install it by `pip install "
        "'retrace-attention[lm-eval]'`, or read any text file with --text FILE."
    )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "trace"
