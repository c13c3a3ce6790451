"""An export that lies there already, held against the student that it should be."""

from collections.abc import Iterable
from pathlib import Path

import torch

from configs.refusal import Refused
from stages.export import tensorfile
from stages.export.content import HALF, Content, types_of
from stages.export.ldm import open_folder, verify_file
from stages.export.modelspec import metadata
from stages.export.ours import FACTS, facts_of, refuse_changed, refuse_foreign_file
from stages.export.stale import single_files
from stages.export.verify import verify_folder
from stages.nets.student import Student

TYPES = {"float16": torch.float16, "float32": torch.float32}


def verify_export(out: Path, student: Student, teacher_folder: Path) -> tuple[Path, ...]:
    """Every law again for `<out>/diffusers` and our single files beside it; returns what was verified.

    What type and shift to expect is read from the export. Raises `Refused` as exporting does.
    """
    folder = out / "diffusers"
    if not (folder / FACTS).is_file():
        raise Refused(f"{folder}: no export of ours ({FACTS} is missing) - export the run first")
    facts = facts_of(folder)
    types = types_of(TYPES[facts["dtype"]], HALF in facts.get("variants", ()))
    verify_folder(folder, Content(student, teacher_folder, types, facts.get("flow_shift", 1.0)))
    files = single_files(out)
    for file, said in files.items():
        _verify_single(file, said, folder)
    return (folder, *files)


def refuse_occupied(out: Path, files: Iterable[Path] = ()) -> None:
    """Raise `Refused`, before anything is written, where an export into `out` would lose what is not its own.

    `files` are those that it will write beside the diffusers folder.
    """
    refuse_changed(out / "diffusers")
    for file in (out / one for one in files):
        refuse_foreign_file(file)


def _verify_single(file: Path, said: dict[str, str], folder: Path) -> None:
    """A file is held against the folder; its name and its parts are its own choice."""
    unet_only = file.name.endswith("-unet-flow.safetensors")
    held = open_folder(folder, unet_only)
    title = said.get("modelspec.title", "")
    name = title.removesuffix(" flow (sollune)").removesuffix(" UNet")
    told = metadata(held.facts, held.pixels, tensorfile.hash_of(held.in_ldm()), name, unet_only)
    if tensorfile.SEAL in said:  # files from before there were seals are read as well
        told = tensorfile.sealed(told)
    verify_file(file, held, told, file.name)
