"""Which pictures carry the paired error of a student: at each size the median, and the share of the worst tenth.

    python -m benchmarks.pairs RUN/distill --sizes 64x64 96x64

Of the embedded world; a sentence that names size, place and background leaves nothing open. Three minutes a size.
"""

import argparse
from pathlib import Path

import torch

from configs.load import load
from configs.values import PictureSize
from stages.evaluate.paired import PairedInputs, make_reference, normalised_score, relative_errors
from stages.evaluate.recorded_prompts import distinct_texts
from stages.evaluate.settings import Config
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.sampling.fields import student_field, teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler

STEPS, REFERENCE_STEPS = 25, 50


def leaves_nothing_open(text: str) -> bool:
    """Whether a sentence of the embedded world names size, place and background."""
    return " at the " in text and "background" in text and ("small" in text or "large" in text)


def main() -> None:
    """Print a line for each size, of all prompts and of those that leave nothing open."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--sizes", type=PictureSize.parse, nargs="+", required=True)
    parser.add_argument("--prompts", type=int, default=192)
    args = parser.parse_args()
    config = load(Config, "evaluate", [Path("configs/tiny.yaml")], ["--run", str(args.run)])
    saved = open_run(args.run)
    parts = load_run_teacher(saved.origin, torch.device("cpu"), torch.float32)
    teacher, student = Teacher(parts, saved.origin.tail), load_student(saved, parts)
    texts = distinct_texts(config.prompts, config.seed, args.prompts)
    whole = torch.tensor([leaves_nothing_open(text) for text in texts])
    cond, sampler = teacher.encode_texts(texts), Sampler(guidance=3.0)
    for size in args.sizes:
        shape = parts.latent_shape(size)
        noise = fixed_noises(config.seed, len(texts), shape)
        other = fixed_noises(derived_seed("other noise", config.seed), len(texts), shape)
        inputs = PairedInputs(cond, teacher.uncond, noise)
        reference = make_reference(teacher_field(teacher), inputs, other, sampler, (STEPS,), REFERENCE_STEPS)
        x0 = inputs.sample(student_field(student), sampler.model_copy(update={"steps": STEPS}))
        errors = torch.stack([relative_errors(x0, reference.x0), reference.floors[STEPS], reference.ceiling])
        for name, rows in (("all", torch.ones_like(whole)), ("nothing open", whole)):
            own = errors[:, rows]
            worst = own[0].sort(descending=True).values[: max(1, len(own[0]) // 10)].sum() / own[0].sum()
            print(
                f"{size} {name}: {len(own[0])} prompts, error {own[0].mean():.4f}, score {normalised_score(own):.3f}, "
                f"median {own[0].median():.4f}, the worst tenth has {100 * worst:.0f} % of the error",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
