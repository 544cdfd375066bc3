"""How a model is to be loaded: arguments as lm-evaluation-harness takes them, and a device map.

Nothing is loaded here, and no library asked: what cannot be is refused before anything is begun.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from retrace.traces import RetraceError
from retrace.traces.errors import did_you_mean

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of accelerate to fill the devices that there are, then the CPU, then the disk."""
MOST_CHARACTERS = 1_000_000
"""Of a file with a device map."""

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZING: Mapping[str, tuple[Any, ...] | type] = {
    "load_in_4bit": bool,
    "load_in_8bit": bool,
    "bnb_4bit_compute_dtype": COMPUTE_DTYPES,
    "bnb_4bit_quant_storage": (*COMPUTE_DTYPES, "uint8", "int8"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": bool,
    "llm_int8_enable_fp32_cpu_offload": bool,
    "llm_int8_has_fp16_weight": bool,
    "llm_int8_skip_modules": list,
    "llm_int8_threshold": float,
}
"""What says how bitsandbytes quantises the weights, and what each may be."""
OF_BOTH = ("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload")
"""Named after 8 bits, and heeded with 4 bits too."""
OF_FILES: Mapping[str, type] = {
    "cache_dir": str,
    "force_download": bool,
}
"""Where files come from: of no consequence for what is in them."""
OF_PLACES: Mapping[str, type] = {
    "max_cpu_memory": str,
    "max_memory_per_gpu": str,
    "offload_buffers": bool,
    "offload_folder": str,
}
"""What a device map needs besides."""
NAMING: Mapping[str, type] = {
    "peft": str,
    "quantization_config": dict,
    "revision": str,
    "subfolder": str,
    "use_safetensors": bool,
    "variant": str,
}
"""What says which model it is, besides its quantisation and fields of its configuration."""
ELSEWHERE = {
    "attn_implementation": "retrace sets it, to stand between the model and its attention",
    "backend": "retrace loads causal language models alone",
    "batch_size": "say --batch-size N",
    "device": "say --device NAME",
    "device_map": "say --device-map",
    "dtype": "say --dtype NAME",
    "gguf_file": "name the file itself with --pretrained FILE.gguf",
    "max_length": "say --max-length N",
    "parallelize": "say --device-map auto",
    "pretrained": "say --pretrained MODEL",
    "token": "log in with `hf auth login`, or set HF_TOKEN: a trace notes its arguments",
    "torch_dtype": "say --dtype NAME",
    "trust_remote_code": "say --trust-remote-code",
}
"""What lm-evaluation-harness or transformers take as an argument, and retrace does not."""

ModelArguments = dict[str, Any]
DeviceMap = str | dict[str, str | int]


def parse_model_args(given: str | Mapping[str, Any]) -> ModelArguments:
    """Arguments of a model by name: `key=value,...`, a JSON object, or a mapping.

    Values are read as by lm-evaluation-harness: true, false, none, numbers, else text; text in
    quotation marks stays text.

    Raises:
        RetraceError: they cannot be, contradict each other, or belong to an option of their own.

    >>> parse_model_args("load_in_4bit=True,bnb_4bit_quant_type=nf4")
    {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'}
    """
    arguments = _read(given)
    for name, value in arguments.items():
        if name in ELSEWHERE:
            raise RetraceError(f"{name} is no argument of the model here: {ELSEWHERE[name]}.")
        if not name.isidentifier() or name.startswith("_"):
            raise RetraceError(f"The model has no argument {name!r}: names are words.")
        _check_value(name, value)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if "llm_int8_skip_modules" in arguments and isinstance(arguments["llm_int8_skip_modules"], str):
        arguments["llm_int8_skip_modules"] = [arguments["llm_int8_skip_modules"]]
    _check_quantization(arguments)
    _check_subfolder(arguments)
    return arguments


def parse_device_map(given: str | Path | Mapping[str, Any]) -> DeviceMap:
    """Where a model's layers go: `auto` and the like, `cpu`, or a mapping of modules to devices,
    itself, as JSON, or in a file of JSON.

    Raises:
        RetraceError: it is none of these.

    >>> parse_device_map('{"model.embed_tokens": 0, "model.layers": "cpu"}')
    {'model.embed_tokens': 0, 'model.layers': 'cpu'}
    """
    if isinstance(given, str) and given in (*STRATEGIES, "cpu"):
        return given
    mapping = given
    if isinstance(given, str | Path):
        text = str(given)
        if not text.lstrip().startswith("{"):
            text = _file_text(given)
        mapping = _json_object(text, "device_map")
    if not isinstance(mapping, Mapping) or not mapping:
        raise RetraceError("device_map must name a device for each module, such as {'': 'cpu'}.")
    for module, device in mapping.items():
        known = isinstance(device, str) or (type(device) is int and device >= 0)
        if not isinstance(module, str) or not known or device == "meta":
            raise RetraceError(
                f"device_map puts {module!r} on {device!r}: expected the name of a module, and a "
                "GPU's number, cuda:N, cpu or disk."
            )
    return dict(mapping)


def which_model(arguments: ModelArguments | None) -> ModelArguments:
    """Those arguments that say which model it is, less those that say where it comes from or
    goes to."""
    aside = {*OF_FILES, *OF_PLACES}
    return {name: value for name, value in (arguments or {}).items() if name not in aside}


def check_together(arguments: ModelArguments | None, device_map: DeviceMap | None) -> None:
    """Refuse arguments that a device map must be there for, or must not.

    Raises:
        RetraceError: there are some.
    """
    given = arguments or {}
    for name in OF_PLACES:
        if name not in given:
            continue
        if device_map is None:
            raise RetraceError(f"{name} says how layers are spread: say --device-map auto too.")
        if name.startswith("max_") and device_map not in STRATEGIES:
            raise RetraceError(
                f"{name} is for a device map that fills devices by itself: auto, balanced or "
                "sequential."
            )


def _read(given: str | Mapping[str, Any]) -> ModelArguments:
    if isinstance(given, Mapping):
        return {str(name): value for name, value in given.items()}
    if given.lstrip().startswith("{"):
        return _json_object(given, "model_args")
    arguments: ModelArguments = {}
    for part in (part for part in given.split(",") if part.strip()):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name:
            raise RetraceError(
                f"model_args has {part.strip()[:80]!r}, which is not of the form key=value. Values "
                "with commas take JSON: '{\"key\": [1, 2]}'."
            )
        if name in arguments:
            raise RetraceError(f"model_args has {name} twice: leave one out.")
        arguments[name] = _value(value.strip())
    return arguments


def _value(text: str) -> Any:
    """A value as lm-evaluation-harness reads it (`lm_eval.utils.handle_arg_string`)."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _file_text(given: str | Path) -> str:
    path = Path(given)
    try:
        if not path.is_file():
            guess = did_you_mean(str(given), (*STRATEGIES, "cpu"))
            raise RetraceError(
                f"There is no device map {str(given)[:200]!r}.{guess} Give auto, balanced, "
                "sequential, cpu, JSON such as '{\"\": 0}', or a file of it."
            )
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS)
    except UnicodeDecodeError as error:
        raise RetraceError(f"The device map {given} is no text.") from error


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise RetraceError(f"{what} cannot be read as JSON: {told}.") from error
    if not isinstance(found, dict):
        raise RetraceError(f'{what} is no JSON object, such as {{"key": "value"}}.')
    return found


def _check_value(name: str, value: Any) -> None:
    """Refuse a value that the argument cannot have; None is the same as leaving it out."""
    wanted = {**QUANTIZING, **OF_FILES, **OF_PLACES, **NAMING}.get(name)
    if wanted is None or value is None:
        return
    if isinstance(wanted, tuple):
        if value not in wanted:
            raise RetraceError(f"{name} must be one of {', '.join(wanted)}, not {value!r}.")
        return
    fits = type(value) is wanted
    if wanted is float:
        fits = type(value) in (int, float)
    elif wanted is list:
        fits = isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(one, str) for one in value)
        )
    elif name.startswith("max_"):
        fits = type(value) in (int, str)
    if not fits:
        told = {bool: "true or false", str: "text", float: "a number", dict: "an object"}
        told[list] = "names of modules"
        raise RetraceError(f"{name} must be {told[wanted]}, not {str(value)[:80]!r}.")


def _check_quantization(arguments: ModelArguments) -> None:
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if arguments.get(name)]
    if len(bits) == 2:
        raise RetraceError("load_in_4bit and load_in_8bit contradict each other: give one.")
    given = [name for name in arguments if name in QUANTIZING]
    if "quantization_config" in arguments and given:
        raise RetraceError(
            f"quantization_config says how weights are quantised, and so does {given[0]}: leave "
            "one out."
        )
    for name in given:
        if name in ("load_in_4bit", "load_in_8bit"):
            continue
        needed = "load_in_4bit" if name.startswith("bnb_4bit") else "load_in_8bit"
        if needed not in bits and not (name in OF_BOTH and bits):
            raise RetraceError(f"{name} is for {needed}=True: give both, or neither.")


def _check_subfolder(arguments: ModelArguments) -> None:
    folder = PurePosixPath(arguments.get("subfolder", "."))
    if folder.is_absolute() or ".." in folder.parts:
        raise RetraceError(f"subfolder must be one of the model's own, not {str(folder)!r}.")
