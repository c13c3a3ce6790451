"""A student for other programs: `sollune export RUN` writes a diffusers folder and one file in the LDM layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from configs.load import config_from_arguments
from configs.values import Strict
from stages.export.diffusers import export_diffusers
from stages.export.existing import refuse_occupied, remove_stale_files, verify_export
from stages.export.history import class_facts, read_history
from stages.export.ldm import WORKFLOW_FILE, export_ldm, refuse_other_predictions
from stages.export.lora import export_lora, lora_files, verify_lora
from stages.export.original import export_original
from stages.export.tensorfile import single_file_name
from stages.nets.saved import Origin, load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.system.ownership import claim_folder
from stages.system.refusal import Refused

__all__ = [
    "Config",
    "export_all",
    "export_diffusers",
    "export_ldm",
    "export_lora",
    "export_paths",
    "main",
    "run",
]

FOLDER_ONLY_OPTIONS = ("verify", "flow_shift", "name", "single_file", "unet_only")
DTYPES = {"float16": torch.float16, "float32": torch.float32, "both": torch.float32}
USAGE = (
    "usage: sollune export RUN [--checkpoint N] [--out DIR] [--dtype float16|float32|both] [--flow-shift S] "
    "[--name NAME] [--single-file true|false] [--unet-only] [--to folder|pt] [--verify]"
)


class Config(Strict):
    """Write a run's model as a diffusers folder and as one file for ComfyUI and its kind: `sollune export RUN`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    checkpoint: int | None = Field(
        None,
        ge=0,
        description="checkpoint, in samples seen; none: the one it ended with, else its newest",
    )
    to: Literal["folder", "pt"] = Field(
        "folder", description="folder: diffusers and the single file; pt: the original experiment's checkpoint instead"
    )
    out: Path | None = Field(None, description="folder that will hold what is written; none takes RUN/export")
    dtype: Literal["float16", "float32", "both"] = Field(
        "float16",
        description="type of the weights; both: fp32 files with their fp16 variant beside them, and a single file in "
        "fp16",
    )
    flow_shift: float = Field(
        1.0, gt=0, description="shift of the sampling grid written into the scheduler, a pure number"
    )
    name: str | None = Field(
        None,
        pattern=r"^\w[\w.-]*$",
        description="what stands before -flow.safetensors; none takes the teacher's name, with -classes for a model "
        "fine-tuned on classes",
    )
    single_file: bool | None = Field(
        None,
        description="write NAME-flow.safetensors and a ComfyUI workflow beside diffusers/; "
        "none writes them for a student that answers with velocity",
    )
    unet_only: bool = Field(
        False, description="let the single file hold the UNet alone, as NAME-unet-flow.safetensors for UNETLoader"
    )
    verify: bool = Field(
        False, description="write nothing: check the export that lies there, as it says it is, against the checkpoint"
    )

    @model_validator(mode="after")
    def _check_pt_options(self) -> "Config":
        void = [name for name in FOLDER_ONLY_OPTIONS if getattr(self, name) != type(self).model_fields[name].default]
        if self.to == "pt" and void:
            raise ValueError(f"{void[0]} means nothing for a .pt file - leave it out, or leave out to")
        return self


def run(config: Config) -> tuple[Path, ...]:
    """Export one checkpoint, or verify its export; returns the diffusers folder, then what lies beside it.

    Raises `Refused` before anything is written when a single file is asked of a student that predicts no velocity.
    """
    saved = open_run(config.run, config.checkpoint)
    if config.single_file or config.unet_only:
        refuse_other_predictions(saved.origin.target)
    if config.unet_only and config.single_file is False:
        raise Refused("export: --unet-only speaks of the single file, --single-file false leaves it out - choose one")
    parts = load_run_teacher(saved.origin, torch.device("cpu"), torch.float32)
    out, facts = config.out or saved.folder / "export", saved.origin.export_facts(parts, saved.samples)
    if config.to == "pt":
        with claim_folder(out, "export into"):
            return (export_original(saved, parts, out, DTYPES[config.dtype]),)
    student, folder = load_student(saved, parts), parts.folder
    del parts  # 4.3 GB at SD-1.x's size
    if config.verify:
        return verify_export(out, student, folder) + verify_lora(saved, out)
    facts = {**class_facts(saved.folder), **facts}
    lora = lora_files(facts, config.name) if saved.origin.lora else ()
    with claim_folder(out, "export into"):
        refuse_occupied(out, lora)
        written = export_all(
            student,
            folder,
            out,
            facts,
            DTYPES[config.dtype],
            config.flow_shift,
            single_file=config.single_file,
            half_variant=config.dtype == "both",
            unet_only=config.unet_only,
            name=config.name,
            run=saved.folder,
        )
        return written + export_lora(saved, out, config.name)


def export_all(
    student: Student,
    teacher_folder: Path,
    out: Path,
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
    flow_shift: float = 1.0,
    *,
    single_file: bool | None = None,
    half_variant: bool = False,
    unet_only: bool = False,
    name: str | None = None,
    run: Path | None = None,
) -> tuple[Path, ...]:
    """Write `<out>/diffusers`, and one file beside it: unless told, for a student that answers with velocity.

    `run` is the run folder whose history the card tells; none takes the one that `out` lies in. Single files of an
    earlier student that lie in `out` are removed, and that is said. Raises `Refused` before anything is written where
    something that is not ours, or was changed since, would be lost.
    """
    run = run or out.parent
    facts = {**class_facts(run), **facts}
    single = student.vp_bridge is None if single_file is None else single_file
    refuse_occupied(out, single_file_paths(facts, name, unet_only=unet_only) if single else ())
    history = read_history(run, int(facts.get("samples", 0)))
    folder = export_diffusers(
        student, teacher_folder, out, facts, dtype, flow_shift, half_variant=half_variant, history=history
    )
    written = (folder, export_ldm(folder, name, unet_only=unet_only)) if single else (folder,)
    for stale in remove_stale_files(out):
        print(f"{stale}: removed, it was of an earlier student")
    return written


def single_file_paths(
    facts: Mapping[str, Any], name: str | None = None, *, unet_only: bool = False
) -> tuple[Path, ...]:
    """What lies beside the diffusers folder for a student that answers with velocity."""
    return Path(single_file_name(facts, name, unet_only)), Path(WORKFLOW_FILE)


def export_paths(origin: Origin, facts: Mapping[str, Any]) -> tuple[Path, ...]:
    """What a run's export writes beside the diffusers folder at its end."""
    single = single_file_paths(facts) if origin.target == "velocity" else ()
    return (*single, *(lora_files(facts) if origin.lora else ()))


def main(argv: Sequence[str]) -> int:
    """`sollune export RUN ...`."""
    words = ["--run", *argv] if argv and not argv[0].startswith("-") else list(argv)
    if not words:
        raise Refused(f"export: which run? - {USAGE}")
    config = config_from_arguments(Config, "export", words)
    if config is not None:
        for path in run(config):
            print(f"{path}: {'verified' if config.verify else 'written and verified'}")
    return 0
