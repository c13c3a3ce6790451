"""A student for other programs: `sollune export RUN` writes a diffusers folder and one file in the LDM layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from configs.load import config_from_arguments, name_first_argument
from stages.export.comfyui import WORKFLOW_FILE
from stages.export.diffusers import export_diffusers
from stages.export.existing import refuse_occupied, remove_stale_files, verify_export
from stages.export.folds import folds_of
from stages.export.history import class_facts, read_history
from stages.export.ldm import export_ldm, refuse_other_predictions
from stages.export.lora import export_lora, lora_files, verify_lora
from stages.export.original import export_original
from stages.export.shape import can_have_single_file, refuse_foreign_layout
from stages.export.tensorfile import single_file_name
from stages.export.verify_export import DEFAULT_OPTIONS, DTYPES, ExportOptions
from stages.nets.run_folder import Origin, load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.student_shape import LDM_FACT
from stages.sampling.few_steps import few_steps_of, few_steps_of_run
from stages.system.refusal import Refused
from stages.system.storage.remote_claim import claim_place

__all__ = ["export_all", "export_lora", "export_paths"]

FOLDER_ONLY_OPTIONS = ("verify", "flow_shift", "name", "single_file", "unet_only", "fold")
USAGE = (
    "usage: sollune export RUN [--checkpoint N] [--out DIR] [--dtype float16|float32|both] [--flow-shift S] "
    "[--name NAME] [--single-file true|false] [--unet-only] [--fold W ...] [--to folder|pt] [--verify]"
)


class Config(ExportOptions):
    """Write a run's model as a diffusers folder and as one file for ComfyUI and its kind: `sollune export RUN`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    checkpoint: int | None = Field(
        None, ge=0, description="checkpoint, in samples seen; none: the one it ended with, else its newest"
    )
    to: Literal["folder", "pt"] = Field(
        "folder", description="folder: diffusers and the single file; pt: the original experiment's checkpoint instead"
    )
    out: Path | None = Field(None, description="folder for the export; none takes RUN/export")
    verify: bool = Field(
        False, description="write nothing: check an earlier export, with its own settings, against the checkpoint"
    )

    @model_validator(mode="after")
    def _check_pt_options(self) -> "Config":
        void = [name for name in FOLDER_ONLY_OPTIONS if getattr(self, name) != type(self).model_fields[name].default]
        if self.to == "pt" and void:
            raise ValueError(f"{void[0]} does not apply to a .pt file - leave it out, or leave out to")
        return self


def run(config: Config) -> tuple[Path, ...]:
    """Export one checkpoint, or verify its export; returns the diffusers folder, then the files beside it.

    Raises `Refused` before anything is written when a single file is wanted of a student that predicts no velocity.
    """
    saved = open_run(config.run, config.checkpoint)
    if config.single_file or config.unet_only:
        refuse_other_predictions(saved.origin.target)
    if config.unet_only and config.single_file is False:
        raise Refused("export: --unet-only needs the single file, which --single-file false leaves out - choose one")
    few_steps = few_steps_of_run(saved)
    folds_of(config, few_steps)
    components = load_run_teacher(saved.origin, torch.device("cpu"), torch.float32)
    out, facts = config.out or saved.folder / "export", saved.origin.export_facts(components, saved.samples)
    if config.single_file or config.unet_only or config.fold:
        refuse_foreign_layout(facts)
    if config.to == "pt":
        with claim_place(out, "export into"):
            return (export_original(saved, components, out, DTYPES[config.dtype]),)
    student, teacher_folder = load_student(saved, components), components.folder
    del components  # 4.3 GB at SD-1.x's size
    if config.verify:
        return verify_export(out, student, teacher_folder, few_steps) + verify_lora(saved, out)
    facts = {**class_facts(saved.folder), **facts}
    with claim_place(out, "export into"):
        refuse_occupied(out, lora_files(facts, config.name) if saved.origin.lora else ())
        written = export_all(student, teacher_folder, out, facts, config, saved.folder)
        return written + export_lora(saved, out, config.name)


def export_all(
    student: Student,
    teacher_folder: Path,
    out: Path,
    facts: Mapping[str, Any],
    options: ExportOptions = DEFAULT_OPTIONS,
    run: Path | None = None,
) -> tuple[Path, ...]:
    """Write `<out>/diffusers` and one file beside it; without `options.single_file`, that for a velocity student alone.

    The card describes the run in the folder `run`; none takes the one in which `out` lies. Single files of an earlier
    student in `out` are removed, and that is printed. Raises `Refused` before anything is written where a file that is
    not ours, or was changed since, would be lost.
    """
    run, folds = run or out.parent, folds_of(options, few_steps_of(facts, "export"))
    facts = {**class_facts(run), **facts}
    single = student.vp_bridge is None if options.single_file is None else options.single_file
    single = single and can_have_single_file(student.unet)
    refuse_occupied(out, single_file_paths(facts, options) if single else ())
    history = read_history(run, int(facts.get("samples", 0)))
    folder = export_diffusers(student, teacher_folder, out, facts, options, history)
    files = [
        export_ldm(folder, options.name, unet_only=options.unet_only, fold=fold, with_workflow=fold == folds[0])
        for fold in (folds if single else ())
    ]
    written = (folder, *files)
    for stale in remove_stale_files(out):
        print(f"{stale}: removed, it was of an earlier student")
    return written


def single_file_paths(facts: Mapping[str, Any], options: ExportOptions) -> tuple[Path, ...]:
    """What is written beside the diffusers folder for a student that predicts velocity."""
    folds = folds_of(options, few_steps_of(facts, "export"))
    files = [Path(single_file_name(facts, options.name, options.unet_only, fold)) for fold in folds]
    return (*files, Path(WORKFLOW_FILE))


def export_paths(origin: Origin, facts: Mapping[str, Any]) -> tuple[Path, ...]:
    """What a run's export writes beside the diffusers folder at its end."""
    has_single = origin.target == "velocity" and facts.get(LDM_FACT, True)
    single = single_file_paths(facts, DEFAULT_OPTIONS) if has_single else ()
    return (*single, *(lora_files(facts) if origin.lora else ()))


def main(argv: Sequence[str]) -> int:
    """`sollune export RUN ...`."""
    argv = name_first_argument(argv, "run", f"export: which run? - {USAGE}")
    config = config_from_arguments(Config, "export", argv)
    if config is not None:
        for path in run(config):
            print(f"{path}: {'verified' if config.verify else 'written and verified'}")
    return 0
