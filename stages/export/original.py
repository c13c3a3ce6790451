"""A run's student as the original experiment's checkpoint: one .pt file {cfg, student, opt, sched, gstep}."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.export.folder import MOVE_REMEDY
from stages.export.tensorfile import teacher_name
from stages.nets.components import Components
from stages.nets.original_checkpoint import OriginalCheckpoint, read_original
from stages.nets.run_folder import SavedRun, load_student
from stages.nets.student_shape import refuse_pruned
from stages.system.atomic import atomic_path
from stages.system.refusal import Refused, in_one_line


def export_original(run: SavedRun, components: Components, out: Path, dtype: torch.dtype) -> Path:
    """Write `<out>/<teacher>-flow.pt`, reading it back before it gets this name; returns the file.

    `student` holds the averaged weights under the keys of the original's trainer. `opt` and `sched` are empty: the
    optimizer's moments belong to the weights before averaging, and training resumes from a run's own checkpoints.
    Raises `Refused` for a student that equals its teacher, and for weights that are not finite in `dtype`.
    """
    if run.origin.windows is not None:
        raise Refused(
            f"export: --to pt: {run.folder} takes the guidance scale as an input, for which that layout has no place - "
            "leave it out"
        )
    refuse_pruned(run.folder, run.origin.prune, "the layout of --to pt")
    state = load_student(run, components).unet.state_dict()
    student = {f"unet.{name}": value.detach().cpu().to(dtype).contiguous() for name, value in state.items()}
    cfg = original_cfg(run, components)
    content = {"cfg": cfg, "student": student, "opt": {}, "sched": {}, "gstep": run.samples // cfg["batch_size"]}
    file = out / f"{teacher_name(components.name_facts)}-flow.pt"
    OriginalCheckpoint(run.weights, cfg, student, run.samples).weights(components.unet)
    if file.exists() and not {"samples", "target", "tail"} <= read_original(file).cfg.keys():
        raise Refused(f"{file}: is no export of ours, and would be written over - {MOVE_REMEDY}")
    try:
        with atomic_path(file) as temporary:
            with open(temporary, "wb") as handle:
                torch.save(content, handle)
            _verify_written(temporary, student)
    except (RuntimeError, pickle.PicklingError) as error:  # torch hides the disk's words in the error before
        reason = str(error.__context__ or error).splitlines()[0]
        raise Refused(f"{file}: cannot be written ({reason}) - free some space or choose another folder") from error
    return file


def original_cfg(run: SavedRun, components: Components) -> dict[str, Any]:
    """`cfg`: the original's names where it has them, and what `sollune import` needs besides.

    Without a recorded batch size `gstep` counts samples.
    """
    recorded, train = run.weights.parent / "state.json", {}
    try:
        if recorded.exists():
            train = dict(json.loads(recorded.read_text(encoding="utf-8"))["identity"].get("train", {}))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{recorded}: cannot be read ({in_one_line(error)}) - choose another checkpoint") from error
    return {
        "model_id": next(iter(components.name_facts.values())),
        "batch_size": train.get("batch_size", 1),
        "samples": run.samples,
        "target": run.origin.target,
        "tail": run.origin.tail,
    }


def _verify_written(file: Path, student: dict[str, Tensor]) -> None:
    """Raise `Refused` unless a reader that runs no code finds these very tensors."""
    stored = read_original(file).student
    if stored.keys() != student.keys() or not all(torch.equal(stored[key], student[key]) for key in student):
        raise Refused(f"{file}: not read back as it was written - check the disk")
