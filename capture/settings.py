"""What a capture is asked to do."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retrace.capture.queries import parse_queries
from retrace.traces import Location, RetraceError, locate

TASKS = ("wikitext",)
"""Names of the tasks; `retrace.capture.tasks` says what each is."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Settings of a capture, checked when made.

    Raises:
        RetraceError: a setting that cannot be, or two that contradict each other.
    """

    pretrained: str
    """Model: a Hugging Face Hub id, a local folder, a .gguf file, or builtin:smollm2."""
    tasks: Sequence[str] = ()
    """Tasks whose documents the model reads, for example wikitext."""
    text: Sequence[str | Path] = ()
    """Plain text files (UTF-8) that the model reads, cut into consecutive sequences."""
    data: str | Path | None = None
    """Local file or folder (.txt, .jsonl, .parquet) to read the task's documents from."""
    limit: int | None = None
    """Sequences per task and per text file; all of them by default."""
    batch_size: int = 1
    """Sequences that the model reads at once."""
    max_length: int | None = None
    """Tokens of a sequence at most; by default 2048, or the model's maximum where that is less."""
    dtype: str = "auto"
    """Type that the model computes in and the trace stores: auto is the checkpoint's own."""
    device: str = "auto"
    """Device that runs the model: auto is cuda where there is one, else cpu."""
    layers: Sequence[int] | None = None
    """Layers to record; all of them by default."""
    queries: str = "all"
    """Queries to keep: all, last:N of each sequence, or stride:N (every N-th, the last included).
    The last 64 of the prompt are kept besides, keys and values always whole."""
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
        if isinstance(self.tasks, str) or isinstance(self.text, str):
            raise RetraceError("tasks and text must be lists of names, not one string.")
        if not self.tasks and not self.text:
            raise RetraceError(
                f"Nothing to read: name a task ({', '.join(TASKS)}) or a text file (--text FILE)."
            )
        for task in self.tasks:
            _check_task(task)
        for path in self.text:
            if not Path(path).is_file():
                raise RetraceError(f"There is no text file {path}.")
        self._check_data()
        for name, least in (("limit", 1), ("batch_size", 1), ("max_length", 2)):
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

    def _check_data(self) -> None:
        if self.data is None:
            return
        if len(self.tasks) != 1:
            raise RetraceError(
                "data says where the documents of one task are: give one task with it "
                f"({', '.join(TASKS)}), or read plain text with --text FILE."
            )
        if not Path(self.data).exists():
            raise RetraceError(f"There is no data file or folder {self.data}.")

    def output(self) -> Location:
        """Where the trace goes."""
        if self.out is not None:
            return locate(self.out)
        model = Path(self.pretrained.removeprefix("builtin:")).name.removesuffix(".gguf")
        read = [*self.tasks, *(Path(path).stem for path in self.text)]
        return Path("traces") / f"{_slug(model)}-{_slug('-'.join(read))}.zarr"


def _check_task(name: str) -> None:
    if name in TASKS:
        return
    near = difflib.get_close_matches(name, TASKS, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise RetraceError(
        f"There is no task {name!r}.{guess} Tasks: {', '.join(TASKS)}; or read any text file "
        "with --text FILE."
    )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "trace"
