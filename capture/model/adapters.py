"""Adapters of peft: found beside a model's weights or alone, and put on their base."""

import contextlib
import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from retrace.traces import RetraceError

ASK_FOR_PEFT = ("transformers.integrations.peft", "transformers.models.auto.auto_factory")
"""Modules that put an adapter on if peft is there."""
WHERE = ("revision", "local_files_only", "subfolder", "cache_dir", "force_download")
"""What says which files of a repository, and from where."""
TOLD = ("peft_type", "r", "lora_alpha", "use_rslora", "revision")
"""What of an adapter's configuration a trace repeats."""


@dataclass(frozen=True)
class Adapter:
    """An adapter, and the model that it goes on."""

    location: str
    """Folder or Hub id of the adapter."""
    base: str
    """Folder or Hub id of the model."""
    configuration: Mapping[str, Any]
    """What peft wrote of the adapter."""
    where: Mapping[str, Any]
    """Which revision of a repository, and whether from the cache alone."""

    @property
    def facts(self) -> dict[str, Any]:
        """As the trace's attributes have them."""
        told = {name: self.configuration[name] for name in TOLD if name in self.configuration}
        return {"adapter": self.location, "base": self.base, **told}

    @property
    def has_tokenizer(self) -> bool:
        """Whether it brings a tokenizer, for tokens that it added."""
        file = cached_file(
            self.location,
            "tokenizer_config.json",
            **self.where,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return file is not None

    def put_on(self, model: Any) -> None:
        """Put the adapter on its base, all of its weights.

        Raises:
            RetraceError: the adapter and the model do not have the same weights.
        """
        with _on_devices(model):
            found = model.load_adapter(self.location, adapter_kwargs=dict(self.where))
        for what, names in (
            ("lacks", found.missing_keys),
            ("has weights that have no place there,", found.unexpected_keys),
            ("has weights of other shapes,", [name for name, *_ in found.mismatched_keys]),
        ):
            if names:
                raise RetraceError(
                    f"The adapter {self.location} is not for {self.base}: it {what} {min(names)}"
                    f"{_and_more(len(names))}."
                )


def find_adapter(
    pretrained: str, location: str, options: Mapping[str, Any], base: str | None = None
) -> Adapter | None:
    """The adapter in a model's folder or repository; None where there is none. It goes on the model
    at `base`, or the one that it names.

    Raises:
        RetraceError: it cannot be put on: peft is not installed, or no base is named.
    """
    where = {name: options[name] for name in WHERE if name in options}
    file = find_adapter_config_file(location, **where)
    if file is None:
        return None
    if importlib.util.find_spec("peft") is None:
        raise RetraceError(
            f"{pretrained} has an adapter (adapter_config.json), which takes peft to be put on the "
            "model: `pip install peft`, or merge the adapter into the weights first "
            "(`merge_and_unload` of peft)."
        )
    try:
        configuration = json.loads(Path(file).read_text(encoding="utf-8"))
        named = configuration.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise RetraceError(f"{pretrained}: its adapter_config.json cannot be read.") from error
    if base is None:
        base = location if (Path(location) / "config.json").is_file() else named
    if not isinstance(base, str) or not base:
        raise RetraceError(f"{pretrained} is an adapter that names no model to be put on.")
    return Adapter(location, base, configuration, where)


@contextlib.contextmanager
def adapters_left_aside() -> Iterator[None]:
    """transformers loads a model without the adapter beside it meanwhile: it would tell what is
    missing of the adapter in place of what is missing of the model."""
    places: list[Any] = [importlib.import_module(name) for name in ASK_FOR_PEFT]
    before = [place.is_peft_available for place in places]
    for place in places:
        place.is_peft_available = lambda: False
    try:
        yield
    finally:
        for place, found in zip(places, before, strict=True):
            place.is_peft_available = found


@contextlib.contextmanager
def _on_devices(model: Any) -> Iterator[None]:
    """Within this context the model's device map has nothing on the disk, nor on the CPU beside a
    GPU: an adapter is small, and no hook would bring its weights from there."""
    spread = getattr(model, "hf_device_map", None)
    if spread is None:
        yield
        return
    aside = ("cpu", "disk", torch.device("cpu"))
    computing = next((device for device in spread.values() if device not in aside), "cpu")
    model.hf_device_map = {
        module: computing if device in aside else device for module, device in spread.items()
    }
    try:
        yield
    finally:
        model.hf_device_map = spread


def _and_more(count: int) -> str:
    return "" if count == 1 else f" and {count - 1} more"
