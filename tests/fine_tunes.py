"""Fine-tunes of the embedded teacher with random changes, in each form in which models lie on people's disks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.teacher_files.variants import WEIGHT_FILES
from tests.single_files import MODEL, ldm_tensors, part_weights, saved

Tensors = dict[str, Tensor]
MIXED = ("unet", "text_encoder")


def fine_tune(folder: Path, seed: int, size: float = 0.05) -> Path:
    """A copy of the embedded teacher whose UNet and text encoder are changed by noise of this share of each tensor."""
    shutil.copytree(MODEL, folder)
    generator = torch.Generator().manual_seed(seed)

    def noisy(value: Tensor) -> Tensor:
        return value + size * value.std(correction=0) * torch.randn(value.shape, generator=generator)

    for part in MIXED:
        change(folder, part, lambda held: {name: noisy(value) for name, value in held.items()})
    return folder


def change(folder: Path, part: str, changed: Callable[[Tensors], Tensors]) -> Path:
    """Other tensors in a part of a folder."""
    tensors = {name: value.contiguous() for name, value in changed(part_weights(part, folder)).items()}
    save_file(tensors, folder / part / WEIGHT_FILES[part][0], {"format": "pt"})
    return folder


def setting(folder: Path, file: str, **values: Any) -> Path:
    """Other entries in a config of a folder."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def single(folder: Path, file: Path, *parts: str) -> Path:
    """A folder's model, or these parts of it, as one file in the LDM layout: .safetensors or .ckpt."""
    tensors = ldm_tensors(folder, parts or tuple(WEIGHT_FILES))
    if file.suffix == ".safetensors":
        return saved(file, tensors)
    torch.save({"state_dict": tensors}, file)
    return file
