"""A few pictures of each class by student and teacher, from the same noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from stages.evaluate.grid import fixed_noise
from stages.evaluate.metrics import Scorer, all_shown
from stages.evaluate.sample import Sampler, sample_student, sample_teacher
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt


@dataclass(frozen=True)
class Probe:
    """n pictures of each of C classes; the same n noises for all of them."""

    errors: Float[Tensor, "C n"]
    """Mean squared difference of the latents, over the variance of all the teacher's."""
    lost: Float[Tensor, "C n"] | None
    """1 where only the teacher's picture shows all that was said, -1 where only the student's does, else 0; None
    without a scorer."""


def probe(
    student: Student,
    teacher: Teacher,
    prompts: Mapping[str, Sequence[Prompt]],
    seed: int,
    sampler: Sampler,
    scorer: Scorer | None,
) -> Probe:
    """Draw and compare; every class must have as many prompts as the others."""
    count = len(next(iter(prompts.values())))
    asked = [(prompt.text, number) for listed in prompts.values() for number, prompt in enumerate(listed)]
    uncond = teacher.uncond
    squares, lost, values = [], [], []
    for first in tqdm(range(0, len(asked), sampler.batch_size), desc="probe", disable=None):
        texts, numbers = zip(*asked[first : first + sampler.batch_size], strict=True)
        noise = torch.stack([fixed_noise(seed, number, teacher.parts.latent_shape) for number in numbers])
        cond, noise = teacher.encode(texts), noise.to(uncond.device)
        drawn = sample_student(student, cond, uncond, noise, sampler)
        wanted = sample_teacher(teacher, cond, uncond, noise, sampler)
        squares.append((drawn.double() - wanted.double()).square().flatten(1).mean(1).cpu())
        values.append(wanted.double().cpu())
        if scorer is not None:
            shown = [all_shown(scorer(texts, teacher.decode(latents))).float().cpu() for latents in (wanted, drawn)]
            lost.append(shown[0] - shown[1])
    errors = torch.cat(squares) / torch.cat(values).var(correction=0)
    return Probe(errors.view(-1, count), torch.cat(lost).view(-1, count) if scorer is not None else None)
