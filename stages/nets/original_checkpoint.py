"""The original experiment's checkpoint: one .pt file {cfg, student, opt, sched, gstep}, read without running its code.

`cfg` is its trainer's settings as a plain dict, `student` the state dict of a module that holds the UNet as `unet`,
`gstep` counts optimizer steps (david.md 2.3). Wrappers of torch put prefixes before the keys of `student`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stages.system.refusal import Refused
from stages.teacher_files.checkpoint.pickled import read_pickled
from stages.teacher_files.checkpoint.stored import StoredTensor

CHECKPOINT_KEYS = ("cfg", "student", "opt", "sched", "gstep")
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|unet\.)+")
"""Of `DistributedDataParallel`, of `torch.compile`, of the trainer's student."""
TRUST_REMEDY = "get it anew from where you trust it"


@dataclass(frozen=True)
class OriginalCheckpoint:
    """The content of such a file, without the state of its optimizer."""

    file: Path
    cfg: Mapping[str, Any]
    student: Mapping[str, Any]
    gstep: int

    def weights(self, unet: UNet2DConditionModel) -> dict[str, Tensor]:
        """The student's UNet in fp32, under diffusers' names.

        Raises `Refused` with the first tensor that is unknown, missing, of another shape or not finite, and for a file
        that holds the weights of `unet` itself.
        """
        stored, expected = self._unprefixed_student(), unet.state_dict()
        if unknown := sorted(stored.keys() - expected.keys()):
            raise Refused(f"{self.file}: tensor {unknown[0]} is none of the UNet's - name the teacher it was made from")
        if missing := sorted(expected.keys() - stored.keys()):
            raise Refused(f"{self.file}: tensor {missing[0]} is missing - fetch the file again")
        for name, value in stored.items():
            self._check_tensor(name, value, expected[name].shape)
        weights = {name: value.float() for name, value in stored.items()}
        if all(torch.equal(value, expected[name].cpu().float()) for name, value in weights.items()):
            raise Refused(f"{self.file}: holds the teacher's own weights, no student's - take another file")
        return weights

    def _unprefixed_student(self) -> dict[str, Any]:
        """The content of `student`, its keys without the prefixes of wrappers."""
        values: dict[str, Any] = {}
        for key, value in self.student.items():
            name = PREFIXES.sub("", str(key))
            if name in values:
                raise Refused(f"{self.file}: tensor {name} comes twice, the second time as {key} - fetch it again")
            values[name] = value
        return values

    def _check_tensor(self, name: str, value: Any, shape: torch.Size) -> None:
        if not isinstance(value, Tensor):
            raise Refused(f"{self.file}: {name} is no tensor but {type(value).__name__} - fetch it again")
        if value.shape != shape:
            shapes = f"{list(value.shape)}, the teacher's is {list(shape)}"
            raise Refused(f"{self.file}: tensor {name} is {shapes} - name the teacher it was made from")
        if not value.is_floating_point() or not value.isfinite().all():
            raise Refused(f"{self.file}: tensor {name} holds values that are no numbers ({value.dtype}) - take another")


def read_original(file: Path) -> OriginalCheckpoint:
    """Open such a file, its tensors mapped from the disk; raises `Refused` for anything else."""
    if not file.is_file():  # opening a pipe would wait for its writer
        raise Refused(f"{file}: cannot be read (it is no file) - name a .pt file")
    pickled = read_pickled(file, f"{file}:", TRUST_REMEDY)
    if pickled.foreign:
        raise Refused(f"{file}: asks to run {pickled.foreign[0]}, and no code of a file is run - {TRUST_REMEDY}")
    content = pickled.content
    keys = ("cfg", "student", "gstep")
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise Refused(
            f"{file}: is no checkpoint of the original experiment, which holds {', '.join(CHECKPOINT_KEYS)} - name one"
        )
    cfg, student, gstep = (content[key] for key in keys)
    if isinstance(student, Mapping):
        student = {key: value.mapped() if isinstance(value, StoredTensor) else value for key, value in student.items()}
    if not (isinstance(cfg, Mapping) and isinstance(student, Mapping) and isinstance(gstep, int)):
        raise Refused(f"{file}: cfg and student should be mappings, gstep a whole number - fetch it again")
    return OriginalCheckpoint(file, cfg, student, gstep)
