"""Where a model's weights are put as they are loaded, and where they are when they are not at hand.

Weights that accelerate keeps on the CPU or the disk until their module runs are on the device
`meta` in between; a hook of the module brings them.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from retrace.capture.model.arguments import QUANTIZING, STRATEGIES, DeviceMap, ModelArguments
from retrace.traces import RetraceError

DTYPES_OF_QUANTIZING = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def find_device(name: str) -> torch.device:
    """The device of this name; `auto` is cuda where there is one, else cpu."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RetraceError(f"There is no device {name!r}: use auto, cpu or cuda.") from error
    if device.type == "cuda" and not cuda:
        raise RetraceError(f"PyTorch finds no CUDA device for {name!r}: use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RetraceError(
            f"There is no device {name!r}: PyTorch finds {torch.cuda.device_count()}, from cuda:0."
        )
    return device


def placing(
    config: Any, arguments: ModelArguments, device_map: DeviceMap | None, device: str
) -> dict[str, Any]:
    """What `from_pretrained` is told of devices and quantisation; nothing where the model is loaded
    as it is, and moved to its device afterwards.

    Quantised weights are put in place as they are loaded: many can't be moved, or become others.

    Args:
        config: the model's configuration.
        arguments: that the user gives the model.
        device_map: how it is spread, if it is.
        device: the one device that it is on else.

    Raises:
        RetraceError: a device is not there, or a package not installed.
    """
    options: dict[str, Any] = {}
    quantizes = {name: arguments[name] for name in QUANTIZING if name in arguments}
    if quantizes:
        options["quantization_config"] = _bitsandbytes(quantizes)
    elif "quantization_config" in arguments:
        options["quantization_config"] = arguments["quantization_config"]
    quantized = bool(options) or getattr(config, "quantization_config", None) is not None
    if device_map is None:
        target = find_device(device)
        if quantized:
            _require("accelerate", "A quantised model")
            options["device_map"] = {"": target}
        return options
    _require("accelerate", "device_map")
    if not isinstance(device_map, str):
        for place in device_map.values():
            if place != "disk":
                find_device(f"cuda:{place}" if isinstance(place, int) else place)
    options["device_map"] = device_map
    memory = {name: arguments[name] for name in arguments if name.startswith("max_")}
    if memory and device_map in STRATEGIES:
        options["max_memory"] = _max_memory(memory)
    for name in ("offload_folder", "offload_buffers"):
        if name in arguments:
            options[name] = arguments[name]
    return options


def execution_device(module: torch.nn.Module, weight: torch.Tensor) -> torch.device:
    """The device that a module computes on: that of its weight, or where a hook brings it."""
    if weight.device.type != "meta":
        return weight.device
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return torch.device("cpu")


@contextlib.contextmanager
def weights_at_hand(module: torch.nn.Module) -> Iterator[bool]:
    """Within this context the weights that the module itself holds are on the device that it
    computes on; says whether they were brought from elsewhere, and are gone afterwards."""
    if not any(getattr(hook, "offload", False) for hook in _hooks(module)):
        yield False
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield True


def _hooks(module: torch.nn.Module) -> list[Any]:
    """The hooks of accelerate that align a module's device, if it has some."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "execution_device")]


def _bitsandbytes(quantizes: ModelArguments) -> Any:
    configuration: Any = transformers.BitsAndBytesConfig
    if quantizes.get("load_in_4bit") or quantizes.get("load_in_8bit"):
        _require("bitsandbytes", "load_in_4bit and load_in_8bit")
    typed = {
        name: getattr(torch, value) if name in DTYPES_OF_QUANTIZING else value
        for name, value in quantizes.items()
    }
    return configuration(**typed)


def _max_memory(given: ModelArguments) -> dict[int | str, int | str]:
    """Most bytes of each device: as given, else as much as there is."""
    from accelerate.utils import get_max_memory

    most: dict[int | str, int | str] = get_max_memory()
    named = {"cpu": "max_cpu_memory"}
    for device in most:
        name = named.get(str(device), "max_memory_per_gpu")
        most[device] = given.get(name, most[device])
    return most


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RetraceError(
            f"{what} takes {package}: `pip install 'retrace-attention[quantized]'`, or "
            f"`pip install {package}`."
        )
