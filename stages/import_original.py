"""`sollune import FILE.pt --teacher T --out RUN`: a student of the original experiment as a run folder of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from configs.load import config_from_arguments, name_first_argument
from configs.values import Strict
from stages.flow.bridge import TailPolicy
from stages.nets.measured_teacher import load_measured_teacher
from stages.nets.original_checkpoint import OriginalCheckpoint, read_original
from stages.nets.run_folder import CHECKPOINTS_FOLDER, WEIGHTS_FILE, Origin
from stages.nets.student import Target
from stages.system.disk import file_sha256, refuse_unwritable
from stages.system.refusal import Refused
from stages.system.storage.remote_claim import claim_place
from stages.teacher_files.source import TeacherSource
from stages.train.checkpoint import Checkpoints
from stages.train.checkpoint_store import KeepConfig

USAGE = "usage: sollune import FILE.pt --teacher FOLDER --out RUN [--samples N] [--target vp_v|velocity] [--tail T]"


class Config(Strict):
    """Make a run folder of the original experiment's checkpoint: `sollune import FILE.pt --teacher T --out RUN`."""

    file: Path = Field(description="checkpoint {cfg, student, opt, sched, gstep}; no code in it is run")
    teacher: TeacherSource = Field(description="the model that it was distilled from")
    out: Path = Field(description="run folder that will be made")
    samples: int | None = Field(
        None, ge=1, description="samples it was trained on; none takes gstep times the batch size that cfg names"
    )
    target: Target | None = Field(None, description="what its network predicts; none takes that of cfg, or else vp_v")
    tail: TailPolicy | None = Field(
        None, description="its velocity at the noisy end; none takes that of cfg, or else hold"
    )


@dataclass(frozen=True)
class ImportedWeights:
    """The state of a checkpoint that holds weights alone, so that no training resumes from it."""

    tensors: Mapping[str, Tensor]
    samples: int

    def write(self, folder: Path) -> None:
        """Write the weights as the averaged ones, which every reader of a run reads."""
        save_file({f"unet.{name}": value.contiguous() for name, value in self.tensors.items()}, folder / WEIGHTS_FILE)

    def size_bytes(self) -> int:
        """The bytes that `write` writes."""
        return sum(value.nbytes for value in self.tensors.values())


def run(config: Config) -> Path:
    """Read the file, check every tensor against the teacher's, and write the run folder; returns its checkpoint."""
    if config.out.is_dir() and any(config.out.iterdir()):
        raise Refused(f"{config.out}: holds something already - name a new folder with --out")
    refuse_unwritable(config.out / CHECKPOINTS_FOLDER)
    original = read_original(config.file)
    samples = config.samples or _sample_count(original)
    target = config.target or _cfg_choice(original, "target", get_args(Target)) or "vp_v"
    tail = config.tail or _cfg_choice(original, "tail", get_args(TailPolicy)) or "hold"
    teacher = load_measured_teacher(config.teacher, torch.device("cpu"))
    components = teacher.components
    imported = ImportedWeights(original.weights(components.unet), samples)
    source = {"file": config.file.name, "sha256": file_sha256(config.file), "gstep": original.gstep}
    batch_size = max(1, samples // max(1, original.gstep))
    identities = {"imported": source, "train": {"batch_size": batch_size}}
    digests = components.files.digests if components.files else {}
    origin = Origin(config.teacher.location, dict(digests), tail, "", target).with_source(teacher.source)
    print("\n".join(teacher.used.lines))
    with claim_place(config.out, "import into"):
        folder = Checkpoints(config.out / CHECKPOINTS_FOLDER, identities, KeepConfig()).save(imported)
        origin.save(config.out)
    print(f"{folder}: {len(imported.tensors)} tensors after {samples} samples, read as {target}, tail {tail}")
    return folder


def _sample_count(original: OriginalCheckpoint) -> int:
    """Its training samples: as recorded by an export of ours, else steps times batch size."""
    samples, batch_size = original.cfg.get("samples"), original.cfg.get("batch_size")
    if isinstance(samples, int) and samples > 0:
        return samples
    if isinstance(batch_size, int) and batch_size * original.gstep > 0:
        return batch_size * original.gstep
    raise Refused(
        f"{original.file}: cfg.batch_size is {batch_size} and gstep {original.gstep}, "
        "so the number of training samples is unknown - name it with --samples"
    )


def _cfg_choice(original: OriginalCheckpoint, key: str, allowed: Sequence[str]) -> Any:
    """An entry of cfg, None where there is none; raises `Refused` for an unknown value."""
    value = original.cfg.get(key)
    if value is not None and value not in allowed:
        known = ", ".join(allowed)
        raise Refused(f"{original.file}: cfg.{key} is {value!r}, known are {known} - choose one with --{key}")
    return value


def main(argv: Sequence[str]) -> int:
    """`sollune import FILE.pt ...`."""
    argv = name_first_argument(argv, "file", f"import: which file? - {USAGE}")
    config = config_from_arguments(Config, "import", argv)
    if config is not None:
        run(config)
    return 0
