"""An exported diffusers folder as one file in the LDM layout, for ComfyUI, SwarmUI, SD.Next and their kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from configs.atomic import atomic_path, atomic_write
from configs.refusal import Refused
from stages.export import tensorfile
from stages.export.comfyui import workflow
from stages.export.diffusers import FACTS
from stages.export.ldm_names import ldm_names, to_diffusers, to_ldm
from stages.export.modelspec import metadata, teacher_name
from stages.nets.components import check_anatomy, read_json

WORKFLOW = "workflow-comfyui.json"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@dataclass(frozen=True)
class Folder:
    """What an exported diffusers folder holds."""

    facts: Mapping[str, Any]
    """Its `sollune.json`."""
    tensors: Mapping[str, Tensor]
    """`<part>.<diffusers' name>` -> tensor, all of one type."""
    names: Mapping[str, str]
    """The same names -> names in the LDM layout."""
    pixels: int
    """The side of the pictures."""


def export_ldm(folder: Path) -> Path:
    """Write `<teacher>-flow.safetensors` and a ComfyUI workflow beside an exported diffusers folder; returns the file.

    The word `flow` in the name is what SD.Next goes by. The file takes the place of an earlier one only when it was
    read back and holds every tensor of the folder. Raises `Refused` for a folder that is no export of ours, that does
    not predict velocity or holds numbers that are none, for a file that does not come back, and for a full disk.
    """
    held = _open(folder)
    tensors = {held.names[key]: to_ldm(key, value) for key, value in held.tensors.items()}
    told = metadata(held.facts, held.pixels, tensorfile.hash_of(tensors))
    file = folder.parent / f"{teacher_name(held.facts)}-flow.safetensors"
    with atomic_path(file) as temporary:
        tensorfile.write(temporary, tensors, told)
        _read_back(temporary, held, told)
    atomic_write(folder.parent / WORKFLOW, workflow(file.name, held.facts["flow_shift"], held.pixels))
    return file


def refuse_other_predictions(prediction: str) -> None:
    """The programs that read this layout can be told of velocity alone."""
    if prediction != "velocity":
        raise Refused(
            f"export: the student answers with {prediction}, and a single -flow file says velocity - "
            "leave it out with --single-file false"
        )


def _open(folder: Path) -> Folder:
    """Read the folder whole; raises `Refused` when it is not a velocity model that we exported."""
    if not (folder / FACTS).is_file():
        raise Refused(f"{folder}: no export of ours ({FACTS} is missing) - name the diffusers folder of an export")
    facts = read_json(folder / FACTS)
    refuse_other_predictions(facts["prediction"])
    check_anatomy(folder)
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    try:
        tensors = {
            f"{part}.{name}": value
            for part, weights in WEIGHTS.items()
            for name, value in load_file(folder / part / weights).items()
        }
    except (OSError, SafetensorError) as error:
        raise Refused(f"{folder}: its weights cannot be read ({error}) - export the run again") from error
    _check(folder, tensors, getattr(torch, facts["dtype"]))
    levels = len(vae["block_out_channels"])
    names = ldm_names(tensors, unet["layers_per_block"], levels)
    return Folder(facts, tensors, names, unet["sample_size"] * 2 ** (levels - 1))


def _check(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in tensors.items():
        if value.dtype != dtype:
            raise Refused(f"{folder}: {name} is {value.dtype}, {FACTS} says {dtype} - export the run again")
        if not value.isfinite().all():
            raise Refused(f"{folder}: {name} holds values that are no numbers - export the run again")


def _read_back(file: Path, held: Folder, told: Mapping[str, str]) -> None:
    """Find in the file exactly the folder's tensors, and the hash that it states; raises `Refused` otherwise."""
    with safe_open(file, "pt") as found:
        whole = set(found.keys()) == set(held.names.values()) and found.metadata() == told
        wrong = [
            name
            for key, name in held.names.items()
            if whole and not _came_back(key, found.get_tensor(name), held.tensors[key])
        ]
    if not whole or wrong or tensorfile.hash_in(file) != told["modelspec.hash_sha256"]:
        raise Refused(f"export: {wrong[0] if wrong else 'the single file'} did not come back as written - export again")


def _came_back(key: str, value: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of the file is the folder's on the way to diffusers, and itself again on the way back."""
    back = to_diffusers(key, value)
    same = back.dtype == expected.dtype and torch.equal(back, expected)
    return same and value.shape == to_ldm(key, back).shape and torch.equal(to_ldm(key, back), value)
