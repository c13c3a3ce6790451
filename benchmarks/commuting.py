"""Does a student that is trained on small random changes of its teacher carry fine-tunes better by plain delta?

    python -m benchmarks.commuting RUN FINE_TUNE_OR_LORA... [--samples 12800] [--scale 0.3] [--share 0.5] [--seeds 1]

The student of RUN/distill is trained on in two arms of equal samples, rate and order: `control` on the states of
RUN/cache alone; `commuting` with a share of the batches predicted by a teacher whose matrices have changed by random
products of low rank, at states above s = 0.7 that the cache holds, and the same change added to the student while it
learns that batch. Then each fine-tune's difference is added to RUN's own student and to both arms: paired error at 25
steps against the fine-tune, and against the teacher itself (`base`). About ten minutes on an idle core.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.load import load
from shards.reader import Reader
from stages.cache_teacher import Config as CacheConfig
from stages.convert.delta import add_difference
from stages.evaluate.paired import PairedError, teacher_reference
from stages.evaluate.recorded_prompts import distinct_texts
from stages.nets.components import load_components
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.sampling.fields import student_field
from stages.sampling.sampler import Sampler
from stages.teacher_files.source import LoraFile, TeacherSource
from stages.train.ema import Ema, EmaConfig, decay
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.optim import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate

NOISY, RANK, BATCH = 0.7, 8, 16
OPTIMIZER = OptimizerConfig(kind="muon", learning_rate=5e-4, warmup_samples=640)
CPU = torch.device("cpu")


def changed_matrices(unet: nn.Module, generator: torch.Generator, scale: float) -> dict[str, Tensor]:
    """Random products of rank 8 for matrices and kernels: of the attention alone, or of all layers, by a coin.

    Each has the norm of its matrix times one factor, drawn uniformly up to `scale`.
    """
    attention_alone = bool(torch.rand((), generator=generator) < 0.5)
    factor = scale * float(torch.rand((), generator=generator))
    changes = {}
    for name, weight in unet.named_parameters():
        if weight.ndim < 2 or "time_" in name or (attention_alone and ".attn" not in name):
            continue
        rows, columns = weight.shape[0], weight[0].numel()
        change = torch.randn(rows, RANK, generator=generator) @ torch.randn(RANK, columns, generator=generator)
        changes[name] = (change * (factor * weight.detach().norm() / change.norm())).view_as(weight)
    return changes


@contextmanager
def changed(unet: nn.Module, changes: dict[str, Tensor]) -> Iterator[None]:
    """The network with these matrices added; its own values come back to the last bit."""
    parameters = dict(unet.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].add_(change)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def noisy_places(reader: Reader) -> list[tuple[int, int]]:
    """(record, state) of the cached states above `NOISY`."""
    headers = enumerate(reader.headers())
    return [(number, state) for number, header in headers for state, s in enumerate(header.s) if s > NOISY]


def train(
    student: Student, teacher: Teacher, reader: Reader, samples: int, share: float, scale: float, seed: int
) -> Student:
    """The averaged student after so many samples; `share` of the batches are of changed teachers."""
    student.train().requires_grad_(True)
    objective = Objective(ObjectiveConfig(block_weight=0, block_form="cosine"), student.blocks)
    parameters = dict(student.named_parameters())
    optimizer, ema, average = build_optimizer(OPTIMIZER, parameters), Ema(student), EmaConfig(half_life_samples=2000)
    noisy = noisy_places(reader) if share else []
    ordinary, lambdas = reader.batches(0), torch.ones(len(student.blocks))
    for step in range(samples // BATCH):
        before, after = step * BATCH, (step + 1) * BATCH
        generator = torch.Generator().manual_seed(derived_seed("commuting", seed, step))
        changes: dict[str, Tensor] = {}
        batch = next(ordinary).to(CPU, torch.float32)
        if torch.rand((), generator=generator) < share:
            chosen = [noisy[int(row)] for row in torch.randint(len(noisy), (BATCH,), generator=generator)]
            batch = reader.gather(*(np.array(column) for column in zip(*chosen, strict=True))).to(CPU, torch.float32)
            changes = changed_matrices(teacher.components.unet, generator, scale)
            with changed(teacher.components.unet, changes):
                target = teacher.predict(batch.x_s, batch.s, batch.k, batch.cond, teacher.uncond)
            batch = replace(batch, v_cond=target.v_cond.clone(), v_uncond=target.v_uncond.clone())
        optimizer.zero_grad(set_to_none=True)
        with changed(student.unet, changes):
            output = student(batch.x_s, batch.s, batch.cond, teacher.uncond)
            scales = objective.sample_guidance_scales(len(batch), generator)
            objective(output, batch, lambdas, 0.0, scales, torch.ones(len(batch))).total.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        set_learning_rate(optimizer, learning_rate(OPTIMIZER, (before + after) / 2, samples))
        optimizer.step()
        ema.update(decay(average, before, after))
    ema.copy_to_module()
    return student.eval().requires_grad_(False)


def source_of(place: str, teacher: str) -> TeacherSource:
    """A folder, or the teacher with a LoRA file."""
    if place.endswith(".safetensors"):
        return TeacherSource(location=teacher, loras=(LoraFile(file=place, scale=1.0),))
    return TeacherSource(location=place)


def main() -> None:
    """Train both arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("fine_tunes", nargs="+")
    parser.add_argument("--samples", type=int, default=12_800)
    parser.add_argument("--scale", type=float, default=0.3, help="largest norm of a change, relative to its matrix")
    parser.add_argument("--share", type=float, default=0.5, help="share of the batches with changed teachers")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=96)
    args = parser.parse_args()
    saved = open_run(args.run / "distill")
    parts = load_run_teacher(saved.origin, CPU, torch.float32)
    teacher = Teacher(parts, saved.origin.tail)
    config = load(CacheConfig, "cache_teacher", [args.run / "cache.yaml"], [])
    texts, sampler = distinct_texts(config.prompts, 1, args.prompts), Sampler(guidance=3.0, steps=25)
    # Fine-tunes first, so that what is wrong with one is known before the training.
    tuned = {
        Path(place).stem: load_components(source_of(place, parts.location), CPU, torch.float32)
        for place in args.fine_tunes
    }
    references = {
        name: teacher_reference(Teacher(one, saved.origin.tail), texts, 1, sampler, one.native_size, (25,))
        for name, one in tuned.items()
    }
    references["base"] = teacher_reference(teacher, texts, 1, sampler, parts.native_size, (25,))

    def measure(label: str, seed: int, make: Sequence[Tensor]) -> None:
        for name, reference in references.items():
            student = load_student(saved, parts)
            student.load_state_dict(dict(make))
            if name != "base":
                add_difference(student, parts.unet, tuned[name].unet)
            error = reference.summarise(reference.picture_errors(student_field(student), 25), 25)
            print(f"{label:>10} seed {seed} {name:>12}: {_text(error)}", flush=True)

    measure("distilled", 0, load_student(saved, parts).state_dict().items())
    for seed in range(args.seeds):
        for label, share in (("control", 0.0), ("commuting", args.share)):
            reader = Reader(args.run / "cache", "train", seed, BATCH, unstated_size=parts.native_size)
            student = train(load_student(saved, parts), teacher, reader, args.samples, share, args.scale, seed)
            measure(label, seed, [(name, value.clone()) for name, value in student.state_dict().items()])


def _text(error: PairedError) -> str:
    low, high = error.interval or (float("nan"),) * 2
    score = float("nan") if error.score is None else error.score
    return f"error {error.student:.4f}  score {score:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
