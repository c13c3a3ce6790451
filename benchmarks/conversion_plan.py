"""What does a conversion cost at Stable Diffusion 1.5's size?

    python -m benchmarks.conversion_plan FOLDER [options of sollune convert]

Makes a teacher of that size with random weights and a base run with its graft in FOLDER (8 GB), and prints the plan of
converting that teacher by `configs/sd15.yaml`. The passes are counted; one of them is measured here, and a training
step where the memory allows, so the seconds are this machine's. Some minutes on a CPU, in batches of one picture.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.full_size import make_full_size
from stages.__main__ import main as sollune
from stages.nets.components import load_components
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import CHECKPOINTS_FOLDER, COMPLETE_MARK, WEIGHTS_FILE, Origin
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.system.atomic import atomic_write
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.source import TeacherSource

SMALL_BATCHES = (
    "--dtype",
    "float32",
    "--render.batch-size",
    "1",
    "--train.batch-size",
    "1",
    "--train.precision",
    "fp32",
)
"""On a CPU, where half precision is slow and a batch takes minutes; they change no count."""


def make_base(run: Path, teacher: Path) -> None:
    """Write the run folder of a student that is only grafted, unless it is there."""
    folder = run / "distill"
    if (folder / COMPLETE_MARK).exists():
        return
    files = open_teacher_files(TeacherSource(location=str(teacher)))
    parts = load_components(files, torch.device("cpu"), torch.float32)
    student = Student(parts.unet)
    graft_time_embedding(student.unet, Teacher(parts, "hold").bridge)
    weights = folder / CHECKPOINTS_FOLDER / "000000001" / WEIGHTS_FILE
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in student.state_dict().items()}, weights)
    Origin(str(teacher), dict(files.digests), "hold", "", teacher_path=str(teacher.absolute())).save(folder)
    atomic_write(folder / COMPLETE_MARK, "1\n")


def main() -> int:
    """Make what is missing, and print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args, options = parser.parse_known_args()
    teacher = make_full_size(args.folder / "teacher")
    make_base(args.folder / "base", teacher)
    command = ["convert", str(teacher), "--base", str(args.folder / "base"), "--out", str(args.folder / "out")]
    small = () if torch.cuda.is_available() else SMALL_BATCHES
    prompts = ("--prompts.source", "symbolic")
    return sollune([*command, "--config", "configs/sd15.yaml", *prompts, *small, *options, "--plan"])


if __name__ == "__main__":
    sys.exit(main())
