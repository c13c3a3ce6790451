"""Does David see what was spoilt? `python -m benchmarks.sight RUN`, RUN being a distillation such as runs/tiny/distill.

The student at its start is spoilt, block by block, by noise on the weights of the resnet that David listens to, doubled
until that block's features move by MOVED deviations: what lies behind it in the block is heard in the next one, and
some resnets add so little to their input that weak noise on them is heard nowhere. Then one range of time is spoilt, by
noise on the features there. He should name what was spoilt, and raise its lambda most.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from shards.reader import Reader
from stages.david.assessment import Assessor, assess, bins_of
from stages.david.running import RunningAssessment
from stages.evaluate.david import assessment_maps, masked_assessment, read_distill_config, student_features
from stages.nets.features import last_resnets
from stages.nets.graft import graft_time_embedding
from stages.nets.saved import cache_folder, load_run_teacher, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.train.assessor import DavidConfig, load_or_fit_assessor, make_running_assessment
from stages.train.validation import read_first_states

MIN_NAMED = 8
MIN_SHIFT, FIRST_NOISE = 0.3, 0.1
RANGE = (400, 600)
CPU = torch.device("cpu")

Features = Mapping[str, Tensor]


def perturb_block(student: Student, block: str, noise: float, seed: int) -> Student:
    """A copy with noise on the weights of a block's last resnet, of `noise` deviations of each tensor."""
    copied = Student(copy.deepcopy(student.unet))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in last_resnets(copied.unet)[block].parameters():
            if weight.ndim > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return copied.eval()


def perturb_until_shifted(
    student: Student,
    block: str,
    seed: int,
    features_of_student: Callable[[Student], Features],
    clean_features: Features,
) -> tuple[float, Features]:
    """The least of a doubling noise that moves the block's features far enough, and what all blocks then say."""
    noise = FIRST_NOISE
    while True:
        features = features_of_student(perturb_block(student, block, noise, seed))
        moved = (features[block] - clean_features[block]) / clean_features[block].std(dim=0)
        if moved.square().mean().sqrt() >= MIN_SHIFT:
            return noise, features
        noise *= 2


def lambdas_of(assessor: Assessor, voice: RunningAssessment, student: Features, teacher: Features, k: Tensor) -> Tensor:
    """David's lambdas over all of these states."""
    assessed = assess(assessor, student, teacher, bins_of(k, assessor))
    return masked_assessment(assessed, torch.ones_like(k, dtype=torch.bool), assessor.bins, voice)[3]


def main() -> int:
    """0 when the spoilt block is named in at least NEEDED trials, and the spoilt range of time in every block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--states", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    run = open_run(asked.run)
    config = DavidConfig.model_validate(read_distill_config(run).get("david", {}))
    parts = load_run_teacher(run.origin, CPU, torch.float32)
    teacher = Teacher(parts, run.origin.tail)
    assessor = load_or_fit_assessor(config, cache_folder(run.folder), run.folder, CPU, parts.schedule.steps)
    voice = make_running_assessment(assessor, config.fusion, CPU)
    batches = list(read_first_states(Reader(cache_folder(run.folder), "validation"), asked.states))
    k = torch.cat([batch.k for batch in batches])
    target = {block: torch.cat([batch.features[block].float() for batch in batches]) for block in assessor.blocks}
    start = Student.from_teacher(parts.unet).eval()
    graft_time_embedding(start.unet, teacher.bridge)

    def all_of(student: Student) -> Features:
        return student_features(student, iter(batches), teacher.uncond)

    whole = all_of(start)
    before = lambdas_of(assessor, voice, whole, target, k)

    print(f"features of one block moved by {MIN_SHIFT} deviations or more, {len(k)} states, {config.fusion.formula}\n")
    print("| spoilt | seed | noise | worst by David | rise of lambda / w_b: spoilt, next | most risen lambda |")
    print("|---|---|---|---|---|---|")
    named, risen, trials = 0, 0, 0
    for seed in range(asked.seeds):
        for place, block in enumerate(assessor.blocks):
            noise, features = perturb_until_shifted(start, block, seed, all_of, whole)
            rise = lambdas_of(assessor, voice, features, target, k) - before
            emphasis = rise / voice.formula_parameters.w
            worst, most = (assessor.blocks[int(values.argmax())] for values in (emphasis, rise))
            others = torch.cat([emphasis[:place], emphasis[place + 1 :]])
            named, risen, trials = named + (worst == block), risen + (most == block), trials + 1
            print(f"| {block} | {seed} | {noise:.1f} | {worst} | {emphasis[place]:.3f}, {others.max():.3f} | {most} |")
    print(f"\nnamed {named} of {trials}, its lambda rose most in {risen} of {trials}")

    generator = torch.Generator().manual_seed(0)
    here = (k >= RANGE[0]) & (k < RANGE[1])
    found = 0
    for block in assessor.blocks:
        noise = torch.randn(target[block].shape, generator=generator) * target[block].std(dim=0)
        features = {**target, block: torch.where(here[:, None], target[block] + noise / 2, target[block])}
        sight = assessment_maps(assessor, voice, features, target, k)
        row = sight.timestep_error[assessor.blocks.index(block)].nan_to_num(0)
        at = (int(row.argmax()) + 0.5) * 1000 / len(row)
        found += RANGE[0] <= at < RANGE[1]
    print(f"features spoilt at k = {RANGE[0]} to {RANGE[1]}: the greatest error lies there in {found} of 9 blocks")
    enough = min(named, risen) * 9 >= MIN_NAMED * trials and found == len(assessor.blocks)
    return 0 if enough else 1


if __name__ == "__main__":
    raise SystemExit(main())
