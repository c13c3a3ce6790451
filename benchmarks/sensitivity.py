"""How far do a teacher's own pictures move, at each size, when its weights are disturbed a little?

    python -m benchmarks.sensitivity TEACHER --grammar FILE [--noise 0.01 0.02] [--sizes 64x64 64x96 96x64 80x80]

Noise of so many times its root mean square is added to each matrix and kernel of the teacher's UNet. For each size: the
relative squared error of the disturbed velocities, on noised pictures of the teacher at even times, and the paired
score of the disturbed teacher at 25 steps, guidance 3. No student and no training take part: a size at which the same
disturbance yields a higher score is one at which the teacher's own sampling carries small errors further.
About three minutes on an idle core for each level of noise and 96 prompts.
"""

import argparse
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from configs.values import PictureSize
from stages.evaluate.paired import TeacherReference, teacher_reference
from stages.evaluate.recorded_prompts import distinct_texts
from stages.flow.path import interpolate
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.prompts.grammar import GrammarSource
from stages.sampling.fields import teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler

CPU = torch.device("cpu")
STEPS, SEED = 25, 8


def disturbed(teacher: Teacher, noise: float, seed: int) -> Teacher:
    """The teacher with noise on its matrices and kernels."""
    unet, generator = deepcopy(teacher.components.unet), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in unet.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * (noise * weight.square().mean().sqrt()))
    return Teacher(replace(teacher.components, unet=unet), teacher.bridge.tail)


@torch.inference_mode()
def velocity_error(teacher: Teacher, other: Teacher, reference: TeacherReference) -> float:
    """sum |v' - v|^2 / sum |v|^2 of both branches at noised pictures."""
    x0, error, total = reference.x0, 0.0, 0.0
    s = (torch.arange(len(x0)) + 0.5) / len(x0)
    k, known = teacher.bridge.nearest_state(s)
    x = interpolate(x0, fixed_noises(SEED + 1, len(x0), x0.shape[1:]), known).float()
    for rows in torch.arange(len(x0)).split(32):
        inputs = (x[rows], known[rows].float(), k[rows], reference.inputs.cond[rows], reference.inputs.uncond)
        v, moved = teacher.predict(*inputs), other.predict(*inputs)
        for one, same in ((v.v_cond, moved.v_cond), (v.v_uncond, moved.v_uncond)):
            error += float((same - one).square().sum())
            total += float(one.square().sum())
    return error / total


def main() -> None:
    """Print a row for each level of noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--grammar", type=Path, required=True)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.02])
    parser.add_argument("--sizes", type=PictureSize.parse, nargs="+", default=None)
    parser.add_argument("--prompts", type=int, default=96)
    args = parser.parse_args()
    sizes = args.sizes or [PictureSize.parse(text) for text in ("64x64", "64x96", "96x64", "80x80")]
    teacher = Teacher(load_components(args.teacher, CPU, torch.float32), "hold")
    texts = distinct_texts(GrammarSource(source="grammar", grammar=args.grammar), SEED, args.prompts)
    sampler = Sampler(guidance=3.0, steps=STEPS)
    print("| noise | size | velocity | score | 95 % |")
    for size in sizes:
        reference = teacher_reference(teacher, texts, SEED, sampler, size, (STEPS,))
        for noise in args.noise:
            other = disturbed(teacher, noise, SEED)
            paired = reference.summarise(reference.picture_errors(teacher_field(other), STEPS), STEPS)
            low, high = paired.interval or (float("nan"),) * 2
            error = velocity_error(teacher, other, reference)
            print(
                f"| {noise:g} | {size} | {error:.4f} | {paired.score or 0:.3f} | {low:.2f} to {high:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
