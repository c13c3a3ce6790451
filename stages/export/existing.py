"""Single files of an earlier student, which must not stay silently beside the folder of a newer one.

An export that lies there already, held against the student that it should be.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from stages.export import tensorfile
from stages.export.folder import (
    FACTS_FILE,
    is_unmodified_export,
    read_facts,
    read_header,
    refuse_changed,
    refuse_foreign_file,
)
from stages.export.ldm import WORKFLOW_FILE, open_export, verify_single_file
from stages.export.tensorfile import STUDENT_KEY, single_file_metadata
from stages.export.verify import HALF_VARIANT, ExportContent, variant_dtypes, verify_folder
from stages.nets.files import read_json
from stages.nets.student import Student
from stages.system.refusal import Refused


def own_single_files(out: Path) -> dict[Path, dict[str, str]]:
    """The single files in `out` that are ours, by what their headers say; a file that says nothing of us is not."""
    found = {file: read_header(file) for file in sorted(out.glob("*-flow.safetensors"))}
    return {file: said for file, said in found.items() if "sollune.prediction" in said}


def remove_stale_files(out: Path) -> list[Path]:
    """Remove our files of other students than the one in `<out>/diffusers`, and a workflow that loads one of them.

    What somebody changed since is left alone.
    """
    student = read_json(out / "diffusers" / FACTS_FILE)["student_sha256"]
    others = [file for file, said in own_single_files(out).items() if said.get(f"sollune.{STUDENT_KEY}") != student]
    stale = [file for file in others if is_unmodified_export(file)]
    graph = out / WORKFLOW_FILE
    if (
        graph.is_file()
        and is_unmodified_export(graph)
        and any(file.name in graph.read_text(encoding="utf-8") for file in stale)
    ):
        stale.append(graph)
    for file in stale:
        file.unlink()
    return stale


DTYPES = {"float16": torch.float16, "float32": torch.float32}


def verify_export(out: Path, student: Student, teacher_folder: Path) -> tuple[Path, ...]:
    """Every law again for `<out>/diffusers` and our single files beside it; returns what was verified.

    What type and shift to expect is read from the export. Raises `Refused` as exporting does.
    """
    folder = out / "diffusers"
    if not (folder / FACTS_FILE).is_file():
        raise Refused(f"{folder}: no export of ours ({FACTS_FILE} is missing) - export the run first")
    facts = read_facts(folder)
    types = variant_dtypes(DTYPES[facts["dtype"]], HALF_VARIANT in facts.get("variants", ()))
    verify_folder(folder, ExportContent(student, teacher_folder, types, facts.get("flow_shift", 1.0)))
    files = own_single_files(out)
    for file, said in files.items():
        _verify_single_file(file, said, folder)
    return (folder, *files)


def refuse_occupied(out: Path, files: Iterable[Path] = ()) -> None:
    """Raise `Refused`, before anything is written, where an export into `out` would lose what is not its own.

    `files` are those that it will write beside the diffusers folder.
    """
    refuse_changed(out / "diffusers")
    for file in (out / one for one in files):
        refuse_foreign_file(file)


def _verify_single_file(file: Path, header: dict[str, str], folder: Path) -> None:
    """A file is held against the folder; its name and its parts are its own choice."""
    unet_only = file.name.endswith("-unet-flow.safetensors")
    held = open_export(folder, unet_only)
    title = header.get("modelspec.title", "")
    name = title.removesuffix(" flow (sollune)").removesuffix(" UNet")
    told = single_file_metadata(
        held.facts, held.picture_pixels, tensorfile.hash_tensors(held.ldm_tensors()), name, unet_only
    )
    if tensorfile.HEADER_HASH_KEY in header:  # files from before there were seals are read as well
        told = tensorfile.with_header_hash(told)
    verify_single_file(file, held, told, file.name)
