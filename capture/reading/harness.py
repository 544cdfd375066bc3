"""Tasks of lm-eval-harness: the text that it would have a model read, as sequences of tokens."""

import contextlib
import functools
import io
import logging
import random
import socket
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from retrace.capture.model.hub import datasets_offline, hub_reachable
from retrace.capture.model.hub_trouble import GivenUpError, is_of_the_network, noticed_trouble
from retrace.capture.reading.chat import render_chat
from retrace.capture.reading.evidence import parts_of_document
from retrace.capture.reading.positions import encode_with_places
from retrace.capture.reading.windows import SequenceSet, Tokens, WindowCutter
from retrace.capture.settings import TASKS, CaptureSettings
from retrace.traces import Marks, RetraceError, joined_spans
from retrace.traces.errors import did_you_mean

FEWSHOT_SEED = 1234
"""What lm-eval-harness draws examples with, so that they are the ones it would show."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234}
"""What it seeds generators with, from which tasks such as RULER's draw their documents."""
DOWNLOAD_SECONDS = 10
TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")
"""What names a tokenizer in the metadata that tasks are told."""


class Harness:
    """The tasks of an installed lm-eval-harness, those in the settings' own folder included.

    Raises:
        RetraceError: it has none of a name that the settings give.
    """

    def __init__(self, settings: CaptureSettings) -> None:
        self._settings = settings
        with quiet_harness():
            from lm_eval.tasks import TaskManager

            # Its own, which is added to when tasks are loaded: they are told what it then holds.
            self._metadata: dict[str, Any] = {"tokenizer": None, **(settings.metadata or {})}
            folder = None if settings.include_path is None else str(settings.include_path)
            # Reading the harness's own thousands of task files takes ten seconds.
            self._manager: Any = TaskManager(
                include_path=folder, include_defaults=False, metadata=self._metadata
            )
            if not set(settings.harness_tasks()) <= set(self._manager.all_subtasks):
                self._manager = TaskManager(include_path=folder, metadata=self._metadata)
        for name in settings.harness_tasks():
            self._check(name)

    def _check(self, name: str) -> None:
        known = [*TASKS, *self._manager.all_tasks]
        if name in known:
            return
        raise RetraceError(
            f"There is no task {name!r}.{did_you_mean(name, known)} `lm-eval ls tasks` lists them; "
            "task files of your own are read from --include-path FOLDER."
        )

    def read(self, name: str, cut: WindowCutter) -> list[SequenceSet]:
        """The sequences of a task; of a group, those of each of its tasks."""
        reachable = hub_reachable()
        with (
            quiet_harness(),
            noticed_trouble() as trouble,
            contextlib.nullcontext() if reachable else datasets_offline(),
        ):
            try:
                tasks = self._load([name], cut.tokenizer)["tasks"]
                return [self._read(one, task, cut) for one, task in tasks.items()]
            except GivenUpError as error:
                raise RetraceError(
                    f"The task {name} cannot be read: the Hugging Face Hub {error}. Try again "
                    "later, or name local data in a task file (--include-path)."
                ) from error
            except RetraceError:
                raise
            # A task is code of its own, which raises what it likes when its data is not there.
            except Exception as error:
                text = repr(error) if isinstance(error, KeyError) else str(error)
                cause = (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
                cure = "Check its data and its task file"
                if reachable and trouble.cause is not None and is_of_the_network(error):
                    cause = f"the Hugging Face Hub {trouble.cause}"
                elif isinstance(error, ImportError):
                    cure = (
                        "Install what it imports: for RULER by `pip install "
                        "'retrace-attention[ruler]'`, for LongBench by `pip install "
                        "'lm-eval[longbench]'`"
                    )
                elif not reachable:
                    cause += "; the Hugging Face Hub cannot be reached"
                    cure = "Check the network, or name local data in a task file (--include-path)"
                message = f"The task {name} cannot be read: {cause}. {cure}."
                raise RetraceError(message) from error

    def score(self, model: Any) -> dict[str, Any]:
        """What lm-eval-harness finds of a model of its own kind (`lm_eval.api.model.LM`) in all
        tasks of the settings: its `results`, with each document's in `samples`."""
        from lm_eval import evaluator

        reachable = hub_reachable()
        with quiet_harness(), contextlib.nullcontext() if reachable else datasets_offline():
            # Anew each time: examples are drawn in order, and every run must see the same.
            loaded = self._load(self._settings.harness_tasks(), model.tokenizer)
            for name, task in loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise RetraceError(
                        f"The task {name} runs code that the model writes, which retrace does not."
                    )
            found: dict[str, Any] = evaluator.evaluate(
                lm=model, task_dict=loaded, limit=self._settings.limit, bootstrap_iters=0
            )
        return found

    def _load(self, names: list[str], tokenizer: Any) -> dict[str, Any]:
        """Tasks by name, and the groups that they are of, with examples as the settings say. Those
        that make documents of a length of their own are told a tokenizer, by a folder of it."""
        told = self._settings.metadata or {}
        with _seeded(), _downloads_bounded(), tempfile.TemporaryDirectory() as folder:
            if not any(told.get(key) for key in TOKENIZER_KEYS):
                self._metadata["tokenizer"] = folder
                tokenizer.save_pretrained(folder)
            loaded: dict[str, Any] = self._manager.load(names)
        for task in loaded["tasks"].values():
            fewshot = task.get_config("num_fewshot")
            if fewshot is None or (self._settings.num_fewshot is not None and fewshot != 0):
                # As there: a task that says 0 means it.
                task.set_config(key="num_fewshot", value=self._settings.num_fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def _read(self, name: str, task: Any, cut: WindowCutter) -> SequenceSet:
        settings, chat = self._settings, self._settings.apply_chat_template
        as_turns = settings.fewshot_as_multiturn
        task.build_all_requests(
            limit=settings.limit,
            system_instruction=settings.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat if as_turns is None else as_turns,
            chat_template=functools.partial(_chat_text, cut.tokenizer) if chat else None,
        )
        if settings.max_length is None:
            _check_lengths(name, task.instances, cut.max_length + settings.generate)
        sequences: list[Tokens] = []
        scored: list[int] = []
        marks: list[Marks] = []
        for tokens, end, marked in _sequences(task.instances, cut, settings.generate):
            if len(tokens) >= 2:  # one token alone predicts nothing
                sequences.append(np.array(tokens, np.int32))
                scored.append(min(end, len(tokens)))
                marks.append(marked)
        if not sequences:
            raise RetraceError(f"The task {name} holds no text.")
        config = task.config
        source = "/".join(str(part) for part in (config.dataset_path, config.dataset_name) if part)
        shots = task.get_config("num_fewshot")
        return SequenceSet(name, source, sequences, scored, shots, marks)


def _sequences(
    instances: list[Any], cut: WindowCutter, generate: int
) -> Iterator[tuple[list[int], int, Marks]]:
    """(tokens, how many at the end are scored, what is marked) of the requests, equal ones once."""
    seen: set[Any] = set()
    for instance in instances:
        kind, arguments = instance.request_type, instance.args
        texts = (kind, *arguments[: 2 if kind == "loglikelihood" else 1])
        if texts in seen:  # choices that are alike, or a document that is asked about twice
            continue
        seen.add(texts)
        if kind == "loglikelihood_rolling":
            for context, continuation in rolling_windows(cut, arguments[0]):
                # A document that is to be continued is a prompt.
                yield context + continuation, 0 if generate else len(continuation), {}
        elif kind == "loglikelihood":
            context, continuation = encode_pair(cut.tokenizer, arguments[0], arguments[1])
            whole = (context + continuation)[-(cut.max_length + generate) :]
            yield whole, len(continuation), {}
        elif kind == "generate_until":
            tokens = encode(cut.tokenizer, arguments[0])
            marks = _marks(cut.tokenizer, tokens, arguments[0], instance.doc)
            dropped = max(0, len(tokens) - cut.max_length)
            yield tokens[dropped:], 0, _without(marks, dropped)
        else:
            raise RetraceError(f"Requests of the kind {kind} have no text that can be captured.")


def _check_lengths(name: str, instances: list[Any], most: int) -> None:
    """Refuse documents that a task made to be longer than sequences are by default: what is asked
    for would be cut off."""
    made = [i.doc.get("max_length") for i in instances if isinstance(i.doc, Mapping)]
    longest = max((n for n in made if type(n) is int), default=0)
    if longest > most:
        raise RetraceError(
            f"The task {name} makes documents of {longest} tokens, and a sequence has {most}: give "
            f"--max-length {longest}, or shorter ones by --metadata "
            f"'{{\"max_seq_lengths\": [{most}]}}'."
        )


def _chat_text(
    tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """A chat as text; it goes on with the last message where no other is asked for."""
    return render_chat(tokenizer, messages, goes_on=not add_generation_prompt)


def _marks(tokenizer: Any, tokens: list[int], text: str, document: Any) -> Marks:
    """Where the tokens of a text hold what its document tells of evidence and question."""
    parts = parts_of_document(document, text)
    if not parts or not getattr(tokenizer, "is_fast", False):
        return {}
    encoded = encode_with_places(tokenizer, text)
    before = len(tokens) - len(encoded.tokens)
    if before < 0 or tokens[before:] != encoded.tokens:
        return {}  # special tokens stand after it as well
    found = {
        name: joined_spans([p for part in places for p in encoded.positions(part.start, part.stop)])
        for name, places in parts.items()
    }
    return {
        name: [range(p.start + before, p.stop + before) for p in places]
        for name, places in found.items()
    }


def _without(marks: Marks, dropped: int) -> Marks:
    """Marks of a sequence without its first `dropped` positions: those that are left whole."""
    left = {
        name: [range(p.start - dropped, p.stop - dropped) for p in places if p.start >= dropped]
        for name, places in marks.items()
    }
    return {name: places for name, places in left.items() if places}


def rolling_windows(cut: WindowCutter, document: str) -> Iterator[tuple[list[int], list[int]]]:
    """(context, scored) token ids of each window of a document, as lm-eval-harness cuts it for a
    model that reads `max_length - 1` positions: each token is scored once, the first after a
    prefix token, and the last window reaches back for a full context. The harness does not give a
    model the last token, which a sequence holds as well."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    begin = prefix_token(cut.tokenizer)
    if begin is None:
        raise RetraceError(
            "The tokenizer has no token that begins or ends a text, and lm-eval-harness puts one "
            "before a document: read it by --text FILE instead."
        )
    tokens = encode(cut.tokenizer, document)
    windows = get_rolling_token_windows(tokens, begin, cut.max_length - 1, context_len=1)
    yield from map(make_disjoint_window, windows)


def prefix_token(tokenizer: Any) -> int | None:
    """The token that lm-eval-harness puts before a text that has no context: BOS, or else EOS."""
    begin: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with the special tokens that the tokenizer puts there by itself, once."""
    begin = tokenizer.bos_token or tokenizer.eos_token
    special = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
    tokens: list[int] = tokenizer(text, **special)["input_ids"]
    return tokens


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation, as lm-eval-harness splits them: tokenised
    together and cut where the context alone would end, its trailing spaces belonging to the
    continuation."""
    if not context:
        begin = prefix_token(tokenizer)
        tokens = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if begin is None or tokens[:1] == [begin]:
            return tokens[:1], tokens[1:]
        return [begin], tokens
    stripped = context.rstrip()
    whole = encode(tokenizer, context + continuation)
    length = len(encode(tokenizer, stripped))
    return whole[:length], whole[length:]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """What is drawn meanwhile is what lm-eval-harness would draw, and is not drawn of anything
    else's."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _downloads_bounded() -> Iterator[None]:
    """Tasks that make or fetch documents themselves, as RULER's do, print nothing meanwhile, and
    wait no longer for the network than the Hub's client does."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """lm-eval-harness shows no progress and no advice meanwhile."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import lm_eval.api.task as tasks

        bars = tasks.tqdm
        tasks.tqdm = lambda items, **options: items  # no setting turns it off
        try:
            yield
        finally:
            tasks.tqdm = bars
    finally:
        logger.setLevel(level)
