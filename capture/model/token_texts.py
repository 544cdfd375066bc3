"""The texts of a trace's tokens, by its model's tokenizer, if that is on this machine."""

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from retrace.capture.model.loading import located, quiet_libraries, reading_gguf_with
from retrace.traces import RetraceError, Trace


def token_texts(trace: Trace) -> Callable[[Sequence[int]], list[str]]:
    """A function that gives the text of each of some token ids of a trace.

    A trace is data that anybody may have written: no code of its model is run, and nothing is
    downloaded.

    Raises:
        RetraceError: the trace names no tokenizer, it is not here, or it is another one.
    """
    model, known = (trace.attributes.get(name) for name in ("model", "tokenizer"))
    name = model.get("pretrained") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str) or not isinstance(known, dict):
        raise RetraceError(f"{trace.path} names no tokenizer.")
    revision, arguments = model.get("revision"), model.get("arguments")
    inside = arguments.get("subfolder", "") if isinstance(arguments, dict) else ""
    with quiet_libraries():
        tokenizer = _load(name, str(inside), revision if isinstance(revision, str) else None)
    for what, ours in (("class", type(tokenizer).__name__), ("vocabulary", len(tokenizer))):
        if known.get(what) not in (None, ours):
            raise RetraceError(
                f"The tokenizer of {name} is not the one that {trace.path} was captured with: its "
                f"{what} is {ours}, and {known[what]} there."
            )

    def texts(ids: Sequence[int]) -> list[str]:
        return [tokenizer.decode([int(token)], clean_up_tokenization_spaces=False) for token in ids]

    return texts


def _load(name: str, inside: str, revision: str | None) -> Any:
    location, file = located(name, inside)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    reader = None
    if file is not None:
        options["gguf_file"] = file
        reader = functools.cache(importlib.import_module("gguf").GGUFReader)
    elif not Path(location).is_dir():
        options |= {"revision": revision, **({"subfolder": inside} if inside else {})}
    try:
        with reading_gguf_with(reader):
            return AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:  # each kind of tokenizer fails in its own way
        here = Path(location).is_dir()
        cure = "" if here else f' Bring it: `hf download {name} --include "*.json"`.'
        raise RetraceError(f"The tokenizer of {name} cannot be read here.{cure}") from error
