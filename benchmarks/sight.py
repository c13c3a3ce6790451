"""Does David recognise what was perturbed? `python -m benchmarks.sight RUN`, RUN such as runs/tiny/distill.

The student at its start is perturbed, block by block, by noise on the weights of the block's last resnet, which David
reads; the noise is doubled until they move by MIN_SHIFT deviations, since some resnets add so little to their
input that weak noise on them has no effect. Then one range of time is perturbed, by noise on the features there. David
should find the largest error, and raise lambda most, where the noise is.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stages.david.fusion import PUBLISHED_BLOCK_WEIGHTS
from stages.evaluate.david import CPU, HeldOutStates
from stages.nets.features import last_resnets
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import open_run
from stages.nets.student import Student
from stages.train.block_weighter import make_running_assessment

MIN_NAMED = 8
MIN_SHIFT, FIRST_NOISE = 0.3, 0.1
RANGE = (400, 600)

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
    """The first of a doubling noise that moves the block's features far enough, and the features of all blocks then."""
    noise = FIRST_NOISE
    while True:
        features = features_of_student(perturb_block(student, block, noise, seed))
        moved = (features[block] - clean_features[block]) / clean_features[block].std(dim=0)
        if moved.square().mean().sqrt() >= MIN_SHIFT:
            return noise, features
        noise *= 2


def main() -> int:
    """0 when the perturbed block is named in MIN_NAMED of 9 trials or more, and the range of time in every block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--states", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    states = HeldOutStates.open(open_run(options.run), options.states)
    fusion = states.running_assessment.config
    all_blocks = make_running_assessment(states.assessor, fusion, PUBLISHED_BLOCK_WEIGHTS, CPU)
    states = replace(states, running_assessment=all_blocks)  # with those that the objective leaves out
    blocks = states.assessor.blocks
    start = Student.from_teacher(states.components.unet).eval()
    graft_time_embedding(start.unet, states.teacher.bridge)

    def lambdas(features: Features) -> Tensor:
        return states.mean_assessment(states.assess(features))[3]

    clean = states.student_features(start)
    before = lambdas(clean)

    print(f"features of one block moved by {MIN_SHIFT} deviations or more, {len(states.k)} states, {fusion.formula}\n")
    print("| perturbed | seed | noise | worst by David | rise of lambda / w_b: perturbed, next | most risen lambda |")
    print("|---|---|---|---|---|---|")
    named, risen, trials = 0, 0, 0
    for seed in range(options.seeds):
        for place, block in enumerate(blocks):
            noise, features = perturb_until_shifted(start, block, seed, states.student_features, clean)
            rise = lambdas(features) - before
            emphasis = rise / all_blocks.formula_parameters.w
            worst, most = (blocks[int(values.argmax())] for values in (emphasis, rise))
            others = torch.cat([emphasis[:place], emphasis[place + 1 :]])
            named, risen, trials = named + (worst == block), risen + (most == block), trials + 1
            print(f"| {block} | {seed} | {noise:.1f} | {worst} | {emphasis[place]:.3f}, {others.max():.3f} | {most} |")
    print(f"\nnamed {named} of {trials}, its lambda rose most in {risen} of {trials}")

    generator = torch.Generator().manual_seed(0)
    perturbed = (states.k >= RANGE[0]) & (states.k < RANGE[1])
    located = 0
    for place, block in enumerate(blocks):
        teacher = states.features[block]
        noise = torch.randn(teacher.shape, generator=generator) * teacher.std(dim=0)
        features = {**states.features, block: torch.where(perturbed[:, None], teacher + noise / 2, teacher)}
        timestep_error = states.maps(features)[0, place].nan_to_num(0)
        k = (int(timestep_error.argmax()) + 0.5) * 1000 / len(timestep_error)
        located += RANGE[0] <= k < RANGE[1]
    print(
        f"features perturbed at k = {RANGE[0]} to {RANGE[1]}: the largest error is there in {located} of {len(blocks)}"
    )
    return 0 if min(named, risen) * 9 >= MIN_NAMED * trials and located == len(blocks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
