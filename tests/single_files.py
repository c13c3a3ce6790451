"""The embedded teacher as the files in which SD-1.x models lie on people's disks."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.teacher_files.ldm_names import ldm_name, to_ldm
from stages.teacher_files.variants import WEIGHT_FILES

MODEL = Path("stages/tiny/model").absolute()
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


def part_weights(part: str, folder: Path = MODEL) -> dict[str, Tensor]:
    """The tensors of a part by diffusers' names."""
    return load_file(folder / part / WEIGHT_FILES[part][0])


def ldm_tensors(folder: Path = MODEL, parts: tuple[str, ...] = tuple(WEIGHT_FILES)) -> dict[str, Tensor]:
    """The tensors of a model in the LDM layout."""
    keyed = {f"{part}.{name}": value for part in parts for name, value in part_weights(part, folder).items()}
    return {ldm_name(key, 1, 4): to_ldm(key, value).contiguous() for key, value in keyed.items()}


def averaged(tensors: Mapping[str, Tensor], factor: float = 1.5) -> dict[str, Tensor]:
    """The averaged weights beside plain ones, as the trainer of LDM names them."""
    unet = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith(UNET)}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {f"model_ema.{name.replace('.', '')}": factor * value for name, value in unet.items()} | counters


def saved(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A .safetensors file of these tensors."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, dict(metadata or {}))
    return file


def folder_of(target: Path, suffix: str, write: str = "whole") -> Path:
    """A copy of the embedded folder whose weights are .bin files, shards, or under the name of a variant."""
    shutil.copytree(MODEL, target)
    for part, (safe, old) in WEIGHT_FILES.items():
        tensors, file = part_weights(part), target / part / safe
        file.unlink()
        if write == "bin":
            torch.save(tensors, target / part / old)
        elif write == "variant":
            saved(file.with_name(safe.replace(".safetensors", f".{suffix}.safetensors")), tensors)
    return target
