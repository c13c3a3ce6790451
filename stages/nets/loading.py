"""One part of a model, loaded by its library from exactly the files that count; raises `Refused` unless complete."""

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

from stages.nets.tokens import check_tokenizer
from stages.system.refusal import Refused
from stages.teacher_files.folder import FETCH_REMEDY, component_files, linked_folder, read_json

COMPONENT_CLASSES: Mapping[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
Loaded = TypeVar("Loaded")
ALIGNMENT_BYTES = 64
"""Where matrices begin for which a processor's library of linear algebra gives the same bits every time (Intel oneMKL
developer guide, conditional numerical reproducibility)."""


def load_component(folder: Path, component: str, dtype: torch.dtype) -> Any:
    """UNet, autoencoder or text encoder of a folder, frozen.

    Raises `Refused` unless its files hold exactly its tensors, each in its shape and finite.
    """
    files, where = component_files(folder, component), f"teacher: {folder}/{component}"
    options = {
        "dtype": dtype,
        "use_safetensors": not any(file.suffix == ".bin" for file in files),
        "local_files_only": True,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    with linked_folder(files, component) as links:
        module, report = call_library(
            where, links, lambda: COMPONENT_CLASSES[component].from_pretrained(links, **options)
        )
    if reason := incomplete_reason(report) or non_finite_reason(module):
        raise Refused(f"{where}: {reason} - {FETCH_REMEDY}, or take the config that belongs to it")
    align_weights(module)
    return module.eval().requires_grad_(False)


def align_weights(module: nn.Module) -> None:
    """Copy the tensors that lie elsewhere in memory, as those of a file do that is read where it is.

    Some processors round otherwise there, and the same weights from two files would give two caches.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder; raises `Refused` unless it has words and fits the text encoder beside it."""

    def load() -> CLIPTokenizer:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(links, local_files_only=True)
        check_tokenizer(folder / "tokenizer", tokenizer, read_json(folder / "text_encoder" / "config.json"))
        return tokenizer

    with linked_folder(component_files(folder, "tokenizer")) as links:
        return call_library(f"teacher: {folder}/tokenizer", links, load)


def call_library(subject: str, folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """The result of a library's call, which prints nothing; any error of a broken file becomes a `Refused`."""
    try:
        with quiet_libraries():
            return load()
    except (MemoryError, torch.OutOfMemoryError, Refused):
        raise
    except Exception as error:  # configs and files can be broken in any way, and libraries raise anything at them
        reason = " ".join(str(error).split()).replace(f"{folder}/", "").replace(str(folder), "it")[:200]
        raise Refused(f"{subject} cannot be used ({type(error).__name__}: {reason}) - {FETCH_REMEDY}") from error


def incomplete_reason(report: Mapping[str, Any]) -> str:
    """Which tensors a library filled with random numbers or left out, by its report; empty for none."""
    mismatched = sorted(report["mismatched_keys"], key=str)  # (name, shape in the file, shape in the model)
    defects = {
        "missing": sorted(report["missing_keys"]),
        "unknown": sorted(report["unexpected_keys"]),
        "of another shape": [f"{name} ({list(shape)}, the config says {list(own)})" for name, shape, own in mismatched],
        "not loaded": list(map(str, report.get("error_msgs") or ())),
    }
    return "; ".join(_defect_text(defect, names) for defect, names in defects.items() if names)


def non_finite_reason(module: nn.Module) -> str:
    """The first tensor with values that are not finite, and how many; empty where there is none."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and (count := int((~value.isfinite()).sum())):
            return f"tensor {name} is not finite in {count} of {value.numel()} values"
    return ""


def _defect_text(defect: str, names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} {defect}, such as {names[0]}"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' progress bars and warnings: their report is read instead."""
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars: Any = transformers_logging
    bars_enabled = bars.is_progress_bar_enabled()
    try:
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
        bars.disable_progress_bar()
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if bars_enabled:
            bars.enable_progress_bar()
