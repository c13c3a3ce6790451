"""An exported diffusers folder as one file in the LDM layout, for ComfyUI, SwarmUI, SD.Next and their kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from configs.atomic import atomic_path, atomic_write
from configs.refusal import Refused
from stages.export import checks, tensorfile
from stages.export.comfyui import workflow
from stages.export.content import FILES, HALF, weight_file
from stages.export.ldm_names import ldm_names, to_diffusers, to_ldm
from stages.export.modelspec import file_name, metadata, teacher_name
from stages.export.ours import FACTS, facts_of, refuse_foreign_file
from stages.export.stock import stock_reads_the_same
from stages.export.verify import read_tensors
from stages.nets.anatomy import check_anatomy
from stages.nets.files import read_json

WORKFLOW = "workflow-comfyui.json"


@dataclass(frozen=True)
class Folder:
    """What an exported diffusers folder holds, as far as one file takes it over."""

    path: Path
    facts: Mapping[str, Any]
    """Its `sollune.json`."""
    variant: str
    """Which of its files are taken over; the plain ones' variant is the empty word."""
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    """`<part>.<diffusers' name>` -> tensor, all of one type."""
    names: Mapping[str, str]
    """The same names -> names in the LDM layout."""
    pixels: int
    """The side of the pictures."""
    unet_only: bool

    def in_ldm(self) -> dict[str, Tensor]:
        """The tensors as one file holds them."""
        return {self.names[key]: to_ldm(key, value) for key, value in self.tensors.items()}


def export_ldm(folder: Path, name: str | None = None, *, unet_only: bool = False) -> Path:
    """Write `<name>-flow.safetensors` and a ComfyUI workflow beside an exported diffusers folder; returns the file.

    Unless told, the name is the teacher's. The tensors are the folder's, of the fp16 variant where it has one. The file
    appears whole and verified or not at all. Raises `Refused` for a folder that is no velocity model of ours, for a
    tensor that no SD-1.x model has, for a file that breaks a law of `checks`, and for a full disk.
    """
    held = open_folder(folder, unet_only)
    file = folder.parent / file_name(held.facts, name, unet_only)
    tensors = held.in_ldm()
    told = tensorfile.sealed(metadata(held.facts, held.pixels, tensorfile.hash_of(tensors), name, unet_only))
    refuse_foreign_file(file)
    refuse_foreign_file(folder.parent / WORKFLOW)
    with atomic_path(file) as temporary:
        readable = temporary.with_suffix(".safetensors")  # stock diffusers goes by the ending
        try:
            tensorfile.write(readable, tensors, told)
            verify_file(readable, held, told, file.name)
            readable.replace(temporary)
        finally:
            readable.unlink(missing_ok=True)
    graph = workflow(file.name, held.facts["flow_shift"], held.pixels, _lender(held) if unet_only else None)
    atomic_write(folder.parent / WORKFLOW, graph)
    return file


def verify_file(file: Path, held: Folder, told: Mapping[str, str], name: str) -> None:
    """Raise `Refused` unless the file holds the folder's tensors, says `told`, and stock diffusers reads it so.

    `name` is what the file is called in messages: it is verified before it gets its name.
    """
    found, meant = read_tensors(file), held.in_ldm()
    checks.same_names(name, found, meant)
    checks.one_type(name, found, held.dtype)
    checks.only_numbers(name, found)
    checks.equal(name, found, meant)
    for key, ldm in held.names.items():
        if not _comes_back(key, found[ldm], held.tensors[key]):
            raise Refused(f"{name}: {ldm} is not {key} again on the way back to diffusers - {checks.AGAIN}")
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    if said != told or tensorfile.hash_in(file) != told["modelspec.hash_sha256"]:
        raise Refused(f"{name}: its header did not come back as written - {checks.AGAIN}")
    stock_reads_the_same(file, name, held.path, held.variant, held.tensors, held.unet_only)


def refuse_other_predictions(prediction: str) -> None:
    """The programs that read this layout can be told of velocity alone."""
    if prediction != "velocity":
        raise Refused(
            f"export: the student answers with {prediction}, and a single -flow file says velocity - "
            "leave it out with --single-file false"
        )


def open_folder(folder: Path, unet_only: bool = False) -> Folder:
    """Read the folder, whole or its network alone; raises `Refused` when it is not a velocity model of ours."""
    if not (folder / FACTS).is_file():
        raise Refused(f"{folder}: no export of ours ({FACTS} is missing) - name the diffusers folder of an export")
    facts = facts_of(folder)
    refuse_other_predictions(facts["prediction"])
    check_anatomy(folder)
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    variant = HALF if HALF in facts.get("variants", ()) else ""
    dtype = torch.float16 if variant else getattr(torch, facts["dtype"])
    tensors = {
        f"{part}.{name}": value
        for part in (["unet"] if unet_only else FILES)
        for name, value in read_tensors(folder / weight_file(part, variant)).items()
    }
    checks.one_type(str(folder), tensors, dtype)
    checks.only_numbers(str(folder), tensors)
    levels = len(vae["block_out_channels"])
    names = ldm_names(tensors, unet["layers_per_block"], levels)
    return Folder(folder, facts, variant, dtype, tensors, names, unet["sample_size"] * 2 ** (levels - 1), unet_only)


def _comes_back(key: str, value: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of the file is the folder's on the way to diffusers, and itself again on the way back."""
    back = to_diffusers(key, value)
    same = back.dtype == expected.dtype and torch.equal(back, expected)
    return same and value.shape == to_ldm(key, back).shape and torch.equal(to_ldm(key, back), value)


def _lender(held: Folder) -> str:
    """The checkpoint that lends text encoder and VAE to a network alone: the teacher's, by its usual name."""
    return f"{teacher_name(held.facts)}.safetensors"
