"""`sollune import FILE.pt --teacher T --out RUN`: a student of the original experiment as a run folder of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from configs.load import config_from_arguments
from configs.values import Location, Strict
from stages.flow.bridge import TailPolicy
from stages.nets.components import load_components
from stages.nets.files import absolute_folder, component_digests
from stages.nets.original import OriginalCheckpoint, read_original
from stages.nets.saved import CHECKPOINTS_FOLDER, WEIGHTS_FILE, Origin
from stages.nets.student import Target
from stages.system.disk import refuse_unwritable
from stages.system.ownership import claim_folder
from stages.system.refusal import Refused
from stages.train.checkpoint import Checkpoints
from stages.train.checkpoint_store import KeepConfig, sha256

USAGE = "usage: sollune import FILE.pt --teacher FOLDER --out RUN [--samples N] [--target vp_v|velocity] [--tail T]"


class Config(Strict):
    """Make a run folder of the original experiment's checkpoint: `sollune import FILE.pt --teacher T --out RUN`."""

    file: Path = Field(description="checkpoint {cfg, student, opt, sched, gstep}; no code in it is run")
    teacher: Location = Field(description="diffusers folder or hub id of the model that it was distilled from")
    out: Path = Field(description="run folder that will be made")
    samples: int | None = Field(
        None, ge=1, description="samples that it has seen; none takes gstep times the batch size that cfg names"
    )
    target: Target | None = Field(
        None, description="what its network answers with; none takes what cfg says, and vp_v where it says nothing"
    )
    tail: TailPolicy | None = Field(
        None, description="its velocity at the noisy end; none takes what cfg says, and hold where it says nothing"
    )


@dataclass(frozen=True)
class ImportedWeights:
    """A checkpoint of nothing but weights: no training goes on from it."""

    tensors: Mapping[str, Tensor]
    samples: int

    def write(self, folder: Path) -> None:
        """Write the weights as the average that every reader of a run asks for."""
        save_file({f"unet.{name}": value.contiguous() for name, value in self.tensors.items()}, folder / WEIGHTS_FILE)

    def size_bytes(self) -> int:
        """What `write` needs."""
        return sum(value.nbytes for value in self.tensors.values())


def run(config: Config) -> Path:
    """Read the file, check every tensor against the teacher's, and write the run folder; returns its checkpoint."""
    if config.out.is_dir() and any(config.out.iterdir()):
        raise Refused(f"{config.out}: holds something already - name a new folder with --out")
    refuse_unwritable(config.out / CHECKPOINTS_FOLDER)
    original = read_original(config.file)
    samples = config.samples or samples_seen(original)
    target = config.target or cfg_choice(original, "target", get_args(Target)) or "vp_v"
    tail = config.tail or cfg_choice(original, "tail", get_args(TailPolicy)) or "hold"
    parts = load_components(config.teacher, torch.device("cpu"), torch.float32)
    imported = ImportedWeights(original.weights(parts.unet), samples)
    made_from = {"file": config.file.name, "sha256": sha256(config.file), "gstep": original.gstep}
    batch = max(1, samples // max(1, original.gstep))
    identities = {"imported": made_from, "train": {"batch_size": batch}}
    path = absolute_folder(config.teacher)
    origin = Origin(config.teacher, component_digests(parts.folder), tail, "", target, teacher_path=path)
    with claim_folder(config.out, "import into"):
        folder = Checkpoints(config.out / CHECKPOINTS_FOLDER, identities, KeepConfig()).save(imported)
        origin.save(config.out)
    print(f"{folder}: {len(imported.tensors)} tensors after {samples} samples, read as {target}, tail {tail}")
    return folder


def samples_seen(original: OriginalCheckpoint) -> int:
    """The samples that it saw: what an export of ours wrote down, else steps times batch size."""
    counted = original.cfg.get("samples"), original.cfg.get("batch_size")
    if isinstance(counted[0], int) and counted[0] > 0:
        return counted[0]
    if isinstance(counted[1], int) and counted[1] * original.gstep > 0:
        return counted[1] * original.gstep
    raise Refused(
        f"{original.file}: cfg.batch_size is {counted[1]} and gstep {original.gstep}, "
        "so the samples seen are unknown - tell them with --samples"
    )


def cfg_choice(original: OriginalCheckpoint, key: str, allowed: Sequence[str]) -> Any:
    """What cfg says of itself, None where it says nothing; raises `Refused` for a word that is unknown."""
    word = original.cfg.get(key)
    if word is not None and word not in allowed:
        raise Refused(f"{original.file}: cfg.{key} is {word!r}, known are {', '.join(allowed)} - tell it with --{key}")
    return word


def main(argv: Sequence[str]) -> int:
    """`sollune import FILE.pt ...`."""
    words = ["--file", *argv] if argv and not argv[0].startswith("-") else list(argv)
    if not words:
        raise Refused(f"import: which file? - {USAGE}")
    config = config_from_arguments(Config, "import", words)
    if config is not None:
        run(config)
    return 0
