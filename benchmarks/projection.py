"""Does a fine-tune carry over better when its difference is projected onto the student's own subspaces, or scaled?

    python -m benchmarks.projection RUN FINE_TUNE_OR_LORA... [--prompts 96]

For each matrix or kernel W of the student with the singular value decomposition U S V', the difference D becomes
U_k U_k' D V_k V_k' with as many singular vectors as hold a share of the energy of W (the idea of LoRA-X, Farhadzadeh et
al. 2025, arXiv:2501.16559, where source and target differ more than here); share 1 is the plain sum. Beside it the
difference times a factor. Paired error at 25 steps, guidance 3, against the fine-tune. Three minutes each.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.commuting import CPU, source_of
from configs.load import load
from stages.cache_teacher import Config as CacheConfig
from stages.convert.delta import add_difference
from stages.evaluate.paired import TeacherReference, teacher_reference
from stages.evaluate.recorded_prompts import distinct_texts
from stages.nets.components import load_components
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import student_field
from stages.sampling.sampler import Sampler

SHARES = (0.5, 0.8, 0.95, 0.99)
FACTORS = (1.0, 1.2, 1.5, 2.0)
STEPS = 25


def project(difference: Tensor, weight: Tensor, share: float) -> Tensor:
    """The part of a matrix's difference between the leading singular vectors of the weight, on both sides."""
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    energy = values.square().cumsum(0) / values.square().sum()
    kept = int((energy < share).sum()) + 1
    u, v = left[:, :kept], right[:kept]
    return (u @ (u.T @ difference.flatten(1).double() @ v.T) @ v).view_as(difference).to(difference)


@torch.no_grad()
def projected(student: Student, plain: Student, share: float) -> Student:
    """`plain`, which has the whole difference to `student`, with that of each matrix projected."""
    own = student.state_dict()
    for name, value in plain.state_dict().items():
        if value.ndim > 1 and not torch.equal(value, own[name]):
            value.copy_(own[name] + project(value - own[name], own[name], share))
    return plain


def main() -> None:
    """Print one line for each share and factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("fine_tunes", nargs="+")
    parser.add_argument("--prompts", type=int, default=96)
    args = parser.parse_args()
    saved = open_run(args.run / "distill")
    parts = load_run_teacher(saved.origin, CPU, torch.float32)
    prompts = load(CacheConfig, "cache_teacher", [args.run / "cache.yaml"], []).prompts
    texts, sampler = distinct_texts(prompts, 1, args.prompts), Sampler(guidance=3.0, steps=STEPS)

    def measure(name: str, label: str, student: Student, reference: TeacherReference) -> None:
        error = reference.summarise(reference.picture_errors(student_field(student), STEPS), STEPS)
        print(f"{name}: {label}: error {error.student:.4f}, score {error.score or float('nan'):.3f}", flush=True)

    for place in args.fine_tunes:
        name, tuned = Path(place).stem, load_components(source_of(place, parts.location), CPU, torch.float32)
        reference = teacher_reference(Teacher(tuned, saved.origin.tail), texts, 1, sampler, tuned.native_size, (STEPS,))
        for factor in FACTORS:
            student = load_student(saved, parts)
            add_difference(student, parts.unet, tuned.unet, factor)
            measure(name, f"factor {factor:g}", student, reference)
        for share in SHARES:
            student = load_student(saved, parts)
            add_difference(student, parts.unet, tuned.unet)
            measure(
                name,
                f"projected, {share:g} of the energy",
                projected(load_student(saved, parts), student, share),
                reference,
            )


if __name__ == "__main__":
    main()
