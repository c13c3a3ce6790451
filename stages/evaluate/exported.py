"""The exported folder of a run, as far as it holds the weights that are measured."""

from pathlib import Path

import torch

from stages.nets.run_folder import SavedRun
from stages.nets.student import Student
from stages.sampling.single_file import load_pipeline
from stages.system.refusal import Refused
from stages.teacher_files.folder import read_json


def verified_export(run: SavedRun, student: Student) -> Path:
    """The run's exported folder; raises `Refused` unless it holds the very weights that are measured."""
    folder = run.folder / "export" / "diffusers"
    hint = f"run sollune export {run.folder}"
    if not folder.is_dir():
        raise Refused(f"{folder}: not there - {hint}")
    dtype = getattr(torch, str(read_json(folder / "sollune.json").get("dtype")), torch.float32)
    exported, expected = load_pipeline(folder, student.unet.device).unet.state_dict(), student.unet.state_dict()
    if any(not torch.equal(value.to(dtype), exported[name].to(dtype)) for name, value in expected.items()):
        raise Refused(f"{folder}: is not the export of {run.weights} - {hint}")
    return folder
