"""Do four, two or one steps give what the teacher gives in many? Runs of several seeds against their teacher.

    python -m benchmarks.few_steps RUN [RUN...] OUT [--prompts 500] [--guidance 3 5 8]

A RUN is a folder such as runs/tiny, one for each seed, with a distilled student and its students of few steps in
RUN/fast/4, /2 and /1 as far as they are finished. Measured on sentences that no training saw, none twice:

- the share of pictures that show all that is named, and the paired error against the teacher at 50 steps, beside the
  teacher and the distilled student at 4, 8 and 25 steps; the distilled student also on shifted grids
- Frechet distance and KID of the judge's features against the teacher at 25 steps from other noises, and the floor:
  the same of the teacher's own pictures, with those of a prompt swapped at random
- for sentences that leave attributes unsaid, how much the answers of the judge to many noises vary otherwise than the
  teacher's (total variation), with the same floor
- calls and seconds for a picture, all models in turns; seconds of the training by its journal

All pictures are kept in OUT and not sampled again (take another OUT where the program has changed how it samples); the
results go to OUT/few_steps.json, the tables to the screen.
About ten minutes of processor for the teacher, which all runs share, and ten for each run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_steps_models import (
    Inputs,
    Measurement,
    Model,
    Pictures,
    Run,
    Subjects,
    counted_rows,
    distinct_sentences,
    make_inputs,
    open_ended,
    open_subjects,
)
from benchmarks.few_steps_results import (
    Samples,
    diversity_results,
    guidance_results,
    marks,
    phase_seconds,
    run_name,
    shift_results,
)
from benchmarks.few_steps_tables import print_tables
from stages.sampling.sampler import Sampler
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

REFERENCE_STEPS, MANY = 50, 25
STEPS = (4, 8, 25)
CHOSEN_GUIDANCE = 5.0
"""Of the shifted grids, of the unsaid attributes and of the seconds."""
SHIFTS, SHIFTED_STEPS, SHIFTED_SOLVERS = (1.0, 1.5, 2.0, 3.0), (4, 8), ("euler", "unipc")
TIMED_PICTURES, TIMED_ROUNDS = 16, 5


def sample_run(measure: Measurement, run: Run, inputs: Inputs, guidance: float, steps: Sequence[int]) -> Samples:
    """Row -> pictures of the students of one run under one guidance scale."""
    few = {
        run_name(n): measure.pictures(model, inputs, Sampler(steps=n, guidance=guidance))
        for n, model in run.fast.items()
    }
    distilled = {
        f"student, {n} steps": measure.pictures(run.distilled, inputs, Sampler(steps=n, guidance=guidance))
        for n in steps
    }
    return few | distilled


def measure_guidance(
    measure: Measurement, subjects: Subjects, inputs: Inputs, other: Inputs, guidance: float
) -> Mapping[str, Any]:
    """Everything that is paired by prompt and noise, under one guidance scale."""

    def teacher(n: int, from_inputs: Inputs = inputs) -> Pictures:
        return measure.pictures(subjects.as_model, from_inputs, Sampler(steps=n, guidance=guidance))

    reference, real = teacher(REFERENCE_STEPS), teacher(MANY, other)
    own = {f"teacher, {n} steps": teacher(n) for n in STEPS}
    of_runs = []
    for run in subjects.runs:
        of_runs.append(sample_run(measure, run, inputs, guidance, STEPS))
        print(f"{run.folder}: guidance {guidance:g} sampled", flush=True)
    return guidance_results(inputs.texts, reference, real, own[f"teacher, {MANY} steps"], own, of_runs)


def measure_diversity(
    measure: Measurement, subjects: Subjects, texts: Sequence[str], noises: int, seed: int
) -> Mapping[str, Any]:
    """How the unsaid attributes of some sentences vary with the noise, beside the teacher."""
    inputs, other = (make_inputs(subjects.teacher, texts, seed, f"unsaid {i}", noises) for i in range(2))
    sampler = Sampler(steps=MANY, guidance=CHOSEN_GUIDANCE)
    own, real = (measure.pictures(subjects.as_model, one, sampler) for one in (inputs, other))
    of_runs = [sample_run(measure, run, inputs, CHOSEN_GUIDANCE, (MANY,)) for run in subjects.runs]
    return diversity_results(texts, own, real, of_runs)


def measure_shifts(measure: Measurement, subjects: Subjects, inputs: Inputs) -> Mapping[str, Any]:
    """The distilled students on shifted grids of few steps, under the chosen guidance."""
    own = Sampler(steps=REFERENCE_STEPS, guidance=CHOSEN_GUIDANCE)
    reference = measure.pictures(subjects.as_model, inputs, own)
    grids = [
        Sampler(steps=n, guidance=CHOSEN_GUIDANCE, solver=solver, shift=shift)
        for n in SHIFTED_STEPS
        for solver in SHIFTED_SOLVERS
        for shift in SHIFTS
    ]
    sampled = [(grid, [measure.pictures(run.distilled, inputs, grid) for run in subjects.runs]) for grid in grids]
    return shift_results(inputs.texts, reference, sampled)


def measure_seconds(subjects: Subjects, inputs: Inputs) -> Mapping[str, Any]:
    """Calls and median seconds for a picture: all models take turns; encoding the sentence is not counted."""
    run = max(subjects.runs, key=lambda one: len(one.fast))
    rows: dict[str, tuple[Model, int]] = {
        f"teacher, {MANY} steps": (subjects.as_model, MANY),
        f"student, {MANY} steps": (run.distilled, MANY),
        **{run_name(n): (model, n) for n, model in run.fast.items()},
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    calls: dict[str, float] = {}
    for _ in range(TIMED_ROUNDS):
        for name, (model, steps) in rows.items():
            with counted_rows(model.unet) as rows_so_far:
                began = time.process_time()
                sampler = Sampler(steps=steps, guidance=CHOSEN_GUIDANCE, batch_size=TIMED_PICTURES)
                latents = inputs.sample(model.field, sampler)
                sampled = time.process_time()
                subjects.teacher.decode_latents(latents)
                seconds[name].append((sampled - began, time.process_time() - began))
                calls[name] = rows_so_far() / len(inputs.texts)
    count = len(inputs.texts)
    return {
        name: {
            "calls": calls[name],
            "sampling_seconds": statistics.median(one for one, _ in of_rounds) / count,
            "picture_seconds": statistics.median(both for _, both in of_rounds) / count,
        }
        for name, of_rounds in seconds.items()
    }


def main() -> None:
    """Sample, measure and print the tables; raises `Refused` before anything is sampled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, such as runs/tiny; one a seed")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 5.0, 8.0])
    parser.add_argument("--seed", type=int, default=5, help="of sentences and noises")
    parser.add_argument("--open-prompts", type=int, default=24, help="sentences that leave attributes unsaid")
    parser.add_argument("--noises", type=int, default=48, help="noises for each of them")
    args = parser.parse_args()
    if min(args.prompts, args.open_prompts, args.noises) < 2:
        raise Refused("--prompts, --open-prompts, --noises: two are the least that can be compared - give more")
    subjects = open_subjects(args.runs)
    texts = distinct_sentences(subjects.source, args.seed, args.prompts)
    open_texts = open_ended(texts, args.open_prompts)
    if not open_texts:
        raise Refused(f"--prompts: {args.prompts}: each of them says everything - give more")
    measure = Measurement(subjects.teacher, args.out / "pictures")
    inputs, other = (make_inputs(subjects.teacher, texts, args.seed, name) for name in ("own", "other"))
    results = {
        "runs": [str(run.folder) for run in subjects.runs],
        "settings": {**vars(args), "runs": None, "out": None},
        "guidance": {
            f"{w:g}": measure_guidance(measure, subjects, inputs, other, w) for w in dict.fromkeys(args.guidance)
        },
        "shifts": measure_shifts(measure, subjects, inputs),
        "diversity": measure_diversity(measure, subjects, open_texts, args.noises, args.seed),
        "seconds": measure_seconds(
            subjects, make_inputs(subjects.teacher, texts[:TIMED_PICTURES], args.seed, "seconds")
        ),
        "training_seconds": [
            {n: phase_seconds(saved.folder) for n, saved in run.saved.items()} for run in subjects.runs
        ],
        "threads": torch.get_num_threads(),
    }
    results["marks"] = marks(results)
    atomic_write(args.out / "few_steps.json", json.dumps(results, indent=1) + "\n")
    print_tables(results)


if __name__ == "__main__":
    try:
        main()
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
