"""Does a student of few steps take the LoRAs and the fine-tunes of its teacher?

    python -m benchmarks.few_steps_transfer RUN FINE_TUNE_OR_LORA... [--windows 4] [--guidance 5] [--prompts 96]

What each of them changed of the teacher is added, tensor by tensor, to the distilled student of RUN/distill and to the
student of RUN/fast/<windows>, folded for the guidance scale as its single file is. Paired error against the fine-tune
at 50 steps: the distilled student at 25 steps and at as few, the student of few steps with the change and without it.
About five minutes on an idle core for each of them.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.commuting import source_of
from stages.convert.delta import add_difference
from stages.evaluate.paired import TeacherReference, bootstrap_interval, relative_errors, teacher_reference
from stages.evaluate.recorded_prompts import distinct_texts, recorded_prompts
from stages.flow.solver import euler
from stages.flow.windows import window_ends
from stages.nets.components import load_components
from stages.nets.guidance import fold_guidance
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import student_field
from stages.sampling.sampler import Sampler, sample_latents

CPU = torch.device("cpu")
MANY, REFERENCE_STEPS, BATCH = 25, 50, 50


def in_windows(student: Student, reference: TeacherReference, windows: int) -> Tensor:
    """The error of each picture that a plain network samples in so many steps, with the guidance inside."""
    inputs, solve = reference.inputs, partial(euler, grid=window_ends(windows))
    x0 = sample_latents(student_field(student), inputs.cond, inputs.uncond, inputs.noise, solve, 1.0, BATCH)
    return relative_errors(x0, reference.x0)


def main() -> None:
    """Measure and print a row for each fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("fine_tunes", nargs="+")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--prompts", type=int, default=96)
    args = parser.parse_args()
    distilled, fast = open_run(args.run / "distill"), open_run(args.run / "fast" / str(args.windows))
    parts = load_run_teacher(distilled.origin, CPU, torch.float32)
    texts = distinct_texts(recorded_prompts(distilled), 6, args.prompts)
    sampler = Sampler(guidance=args.guidance, steps=MANY)
    print(f"| fine-tune | student, {MANY} steps | student, {args.windows} | fast, {args.windows} | fast unchanged |")
    for place in args.fine_tunes:
        tuned = load_components(source_of(place, parts.location), CPU, torch.float32)
        teacher = Teacher(tuned, distilled.origin.tail)
        steps = (args.windows, MANY)
        reference = teacher_reference(teacher, texts, 6, sampler, tuned.native_size, steps, REFERENCE_STEPS)
        plain = load_student(distilled, parts)
        add_difference(plain, parts.unet, tuned.unet)
        unchanged = Student(fold_guidance(load_student(fast, parts).unet, args.guidance)).eval()
        changed = Student(fold_guidance(load_student(fast, parts).unet, args.guidance)).eval()
        add_difference(changed, parts.unet, tuned.unet)
        columns = [
            reference.picture_errors(student_field(plain), MANY),
            reference.picture_errors(student_field(plain), args.windows),
            in_windows(changed, reference, args.windows),
            in_windows(unchanged, reference, args.windows),
        ]
        print(f"| {Path(place).stem} | {' | '.join(_score(errors, reference) for errors in columns)} |", flush=True)


def _score(errors: Tensor, reference: TeacherReference) -> str:
    """The error, and the score between the teacher's own at many steps and from other noise, with its interval."""
    stacked = torch.stack([errors, reference.floors[MANY], reference.ceiling])
    low, high = bootstrap_interval(stacked)
    one, floor, ceiling = stacked.mean(1).tolist()
    return f"{one:.3f}, score {(one - floor) / (ceiling - floor):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
