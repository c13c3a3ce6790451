"""An earlier export in the output folder: verified again, protected, or removed where it belongs to another student."""

from collections.abc import Iterable
from pathlib import Path

from stages.export import tensorfile
from stages.export.checks import EXPORT_REMEDY
from stages.export.comfyui import WORKFLOW_FILE
from stages.export.folder import (
    FACTS_FILE,
    is_unmodified_export,
    read_facts,
    read_header,
    refuse_changed,
    refuse_foreign_file,
)
from stages.export.ldm import open_export, verify_single_file
from stages.export.verify_export import HALF_VARIANT, ExportContent, ExportOptions, verify_folder
from stages.nets.student import Student
from stages.sampling.few_steps import FewSteps, few_steps_of, folded_few_steps
from stages.system.refusal import Refused
from stages.teacher_files.folder import read_json


def refuse_occupied(out: Path, files: Iterable[Path] = ()) -> None:
    """Raise `Refused`, before anything is written, where an export into `out` would lose a file that is not its own.

    `files` are those that it will write beside the diffusers folder.
    """
    refuse_changed(out / "diffusers")
    for file in files:
        refuse_foreign_file(out / file)


def verify_export(
    out: Path, student: Student, teacher_folder: Path, few_steps: FewSteps | None = None
) -> tuple[Path, ...]:
    """Check `<out>/diffusers` and our single files beside it again; returns what was verified.

    The expected type and shift are read from the export; `few_steps` are those of the student's run. Raises `Refused`
    as exporting does.
    """
    folder = out / "diffusers"
    facts = read_facts(folder)
    if (stated := few_steps_of(facts, str(folder / FACTS_FILE))) != few_steps:
        raise Refused(
            f"{folder / FACTS_FILE}: states {_describe(stated)}, its run {_describe(few_steps)} - {EXPORT_REMEDY}"
        )
    dtype = "both" if HALF_VARIANT in facts.get("variants", ()) else facts["dtype"]
    options = ExportOptions(dtype=dtype, flow_shift=facts.get("flow_shift", 1.0))
    verify_folder(folder, ExportContent(student, teacher_folder, options))
    headers = _own_single_files(out)
    for file, header in headers.items():
        _verify_single_file(file, header, folder)
    return (folder, *headers)


def remove_stale_files(out: Path) -> list[Path]:
    """Remove our files of other students than the one in `<out>/diffusers`, and a workflow that loads one of them.

    Files that were changed since are left alone.
    """
    student = read_json(out / "diffusers" / FACTS_FILE)["student_sha256"]
    stale = [
        file
        for file, header in _own_single_files(out).items()
        if header.get(f"sollune.{tensorfile.STUDENT_KEY}") != student and is_unmodified_export(file)
    ]
    workflow = out / WORKFLOW_FILE
    if is_unmodified_export(workflow):
        text = workflow.read_text(encoding="utf-8")
        stale += [workflow] if any(file.name in text for file in stale) else []
    for file in stale:
        file.unlink()
    return stale


def _own_single_files(out: Path) -> dict[Path, dict[str, str]]:
    """Our single files in `out`, known by their headers, and these."""
    headers = {file: read_header(file) for file in sorted(out.glob("*-flow.safetensors"))}
    return {file: header for file, header in headers.items() if "sollune.prediction" in header}


def _verify_single_file(file: Path, header: dict[str, str], folder: Path) -> None:
    """Against the folder; its name and whether it holds the UNet alone are its own choice."""
    unet_only = file.name.endswith("-unet-flow.safetensors")
    folded = folded_few_steps(header, str(file))
    fold = folded.guidance_range[0] if folded else None
    content = open_export(folder, unet_only, fold)
    name = header.get("modelspec.title", "").removesuffix(tensorfile.title_suffix(content.facts, unet_only, fold))
    expected = content.metadata(name)
    if tensorfile.HEADER_HASH_KEY not in header:  # as in files of early versions
        del expected[tensorfile.HEADER_HASH_KEY]
    verify_single_file(file, content, expected, file.name)


def _describe(few_steps: FewSteps | None) -> str:
    if few_steps is None:
        return "no windows"
    return f"{few_steps.windows} windows of guidance {few_steps.guidance_range[0]:g} to {few_steps.guidance_range[1]:g}"
