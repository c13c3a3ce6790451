"""One part of a model, loaded by its library from exactly the files that count, and refused unless it is whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from stages.nets.files import FETCH_REMEDY, component_files, linked_folder, read_json
from stages.nets.tokens import check_tokenizer
from stages.system.refusal import Refused

COMPONENT_CLASSES: Mapping[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
Loaded = TypeVar("Loaded")


def load_component(folder: Path, component: str, dtype: torch.dtype) -> Any:
    """UNet, autoencoder or text encoder of a folder, frozen.

    Raises `Refused` unless every tensor of it is in its files, in its shape and finite, and nothing else is.
    """
    files, where = component_files(folder, component), f"teacher: {folder}/{component}"
    safe = not any(file.suffix == ".bin" for file in files)
    with linked_folder(files) as only:
        loaded, report = call_library(
            where,
            only,
            lambda: COMPONENT_CLASSES[component].from_pretrained(
                only,
                dtype=dtype,
                use_safetensors=safe,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            ),
        )
    if reason := incomplete_reason(report) or non_finite_reason(loaded):
        raise Refused(f"{where}: {reason} - {FETCH_REMEDY}, or take the config that belongs to it")
    return loaded.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder; raises `Refused` unless it has words and fits the text encoder beside it."""
    files, where = component_files(folder, "tokenizer"), f"teacher: {folder}/tokenizer"
    with linked_folder(files) as only:

        def load() -> CLIPTokenizer:
            tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(only, local_files_only=True)
            check_tokenizer(folder / "tokenizer", tokenizer, read_json(folder / "text_encoder" / "config.json"))
            return tokenizer

        return call_library(where, only, load)


def call_library(subject: str, folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """What a library loads, in silence: whatever it raises at a broken file becomes one line."""
    try:
        with _quiet_libraries():
            return load()
    except (MemoryError, torch.OutOfMemoryError, Refused):
        raise
    except Exception as error:  # configs and files can be broken in any way, and libraries raise anything at them
        reason = " ".join(str(error).split()).replace(f"{folder}/", "").replace(str(folder), "it")[:200]
        raise Refused(f"{subject} cannot be used ({type(error).__name__}: {reason}) - {FETCH_REMEDY}") from error


def incomplete_reason(report: Mapping[str, Any]) -> str:
    """What a library's report tells of tensors that it filled with random numbers, or left out; empty for nothing."""
    slips = (
        _first_names("missing", sorted(report["missing_keys"])),
        _first_names("unknown", sorted(report["unexpected_keys"])),
        _first_names("of another shape", [_shape_mismatch(one) for one in sorted(report["mismatched_keys"], key=str)]),
        _first_names("not loaded", list(map(str, report.get("error_msgs") or ()))),
    )
    return "; ".join(filter(None, slips))


def non_finite_reason(module: nn.Module) -> str:
    """The first tensor that holds what is no number, and how often; empty where none does."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            return f"tensor {name} is not finite in {count} of {value.numel()} values"
    return ""


def _first_names(defect: str, names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} {defect}, such as {names[0]}" if names else ""


def _shape_mismatch(mismatched: Any) -> str:
    """transformers and diffusers tell (name, shape in the file, shape in the model)."""
    name, found, expected = mismatched
    return f"{name} ({list(found)}, the config says {list(expected)})"


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """What the libraries would print of missing tensors is read from their report instead."""
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    try:
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
        bars.disable_progress_bar()
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if shown:
            bars.enable_progress_bar()
