"""A student for other programs: `sollune export RUN` writes a diffusers folder and one file in the LDM layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from configs.load import load, request, resolved_yaml
from configs.refusal import Refused
from configs.strict import Strict
from stages.export.diffusers import export_diffusers
from stages.export.ldm import export_ldm, refuse_other_predictions
from stages.export.original import export_original
from stages.nets.saved import load_student, load_teacher_parts, open_run
from stages.nets.student import Student

__all__ = ["Config", "export_all", "export_diffusers", "export_ldm", "main", "run"]

DTYPES = {"float16": torch.float16, "float32": torch.float32}
USAGE = (
    "usage: sollune export RUN [--checkpoint N] [--out DIR] [--dtype float16|float32] [--flow-shift S] "
    "[--single-file true|false] [--to folder|pt]"
)


class Config(Strict):
    """Write a run's model as a diffusers folder and as one file for ComfyUI and its kind: `sollune export RUN`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    checkpoint: int | None = Field(None, ge=0, description="checkpoint, in samples seen; none takes the newest")
    to: Literal["folder", "pt"] = Field(
        "folder", description="folder: diffusers and the single file; pt: the original experiment's checkpoint instead"
    )
    out: Path | None = Field(None, description="folder that will hold both; none takes RUN/export")
    dtype: Literal["float16", "float32"] = Field("float16", description="type of the weights")
    flow_shift: float = Field(
        1.0, gt=0, description="shift of the sampling grid written into the scheduler, a pure number"
    )
    single_file: bool | None = Field(
        None,
        description="write <teacher>-flow.safetensors and a ComfyUI workflow beside diffusers/; "
        "none writes them for a student that answers with velocity",
    )


def run(config: Config) -> tuple[Path, ...]:
    """Export one checkpoint; returns the diffusers folder and, where it is written, the single file.

    Raises `Refused` before anything is written when a single file is asked of a student that predicts no velocity.
    """
    saved = open_run(config.run, config.checkpoint)
    if config.single_file:
        refuse_other_predictions(saved.origin.target)
    parts = load_teacher_parts(saved.origin, torch.device("cpu"), torch.float32)
    out = config.out or saved.folder / "export"
    if config.to == "pt":
        return (export_original(saved, parts, out, DTYPES[config.dtype]),)
    facts = saved.origin.facts(parts, saved.samples)
    student = load_student(saved, parts)
    return export_all(
        student, parts.folder, out, facts, DTYPES[config.dtype], config.flow_shift, single_file=config.single_file
    )


def export_all(
    student: Student,
    teacher_folder: Path,
    out: Path,
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
    flow_shift: float = 1.0,
    *,
    single_file: bool | None = None,
) -> tuple[Path, ...]:
    """Write `<out>/diffusers`, and one file beside it: unless told, for a student that answers with velocity."""
    folder = export_diffusers(student, teacher_folder, out, facts, dtype, flow_shift)
    single = student.vp is None if single_file is None else single_file
    return (folder, export_ldm(folder)) if single else (folder,)


def main(argv: Sequence[str]) -> int:
    """`sollune export RUN ...`."""
    words = ["--run", *argv] if argv and not argv[0].startswith("-") else list(argv)
    if not words:
        raise Refused(f"export: which run? - {USAGE}")
    asked = request(words)
    config = load(Config, "export", asked.files, asked.options)
    if asked.print_config:
        print(resolved_yaml(config, "export"), end="")
    else:
        for path in run(config):
            print(f"{path}: written and read back")
    return 0
