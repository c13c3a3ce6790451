"""How near does `sollune convert` bring a run to fine-tunes of its teacher, and what does the start decide?

    python -m benchmarks.convert RUN OUT [--seeds 0 1 2] [--only style colours shape lora] [--options ...]

Makes the fine-tunes (`benchmarks.finetunes`) in OUT/finetunes, converts each from both starts at equal samples, into
OUT/<fine-tune>/delta and /graft, and measures all on prompts that no training saw: paired error at 25 steps, guidance
3, of the base's own student, graft and delta without training, and both after the polish. What is there is kept. Ratio:
polished delta over polished graft, on more prompts, because few pictures carry most of the error; its 95 % interval
resamples pictures within each seed. All goes to OUT/convert.json. About half an hour for each seed on an idle core.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.finetunes import MODEL, NAMES, make
from stages.convert.starts import Models, load_base_student, make_start
from stages.evaluate.paired import PairedInputs, relative_errors, teacher_reference
from stages.evaluate.recorded_prompts import distinct_texts
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts.grammar import GrammarSource
from stages.sampling.fields import student_field, teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler
from stages.system.atomic import atomic_write

CPU = torch.device("cpu")
STARTS = ("delta", "graft")
RESAMPLES = 2000
STEPS = 25
UNMEASURED = ("--probe.prompts", "2", "--verdict.prompts", "2", "--verdict.steps", "2")
"""The start is given and the result is measured here, so that the command need not."""


def convert(model: Path, base: Path, out: Path, start: str, grammar: Path, options: Sequence[str]) -> float:
    """Convert by the command line unless it is complete; the seconds that it took, or nan."""
    if (out / "distill" / "COMPLETE").exists():
        return float("nan")
    command = [sys.executable, "-m", "stages", "convert"]
    if model.is_dir():
        command.append(str(model))
    else:
        command += [str(MODEL), "--teacher.loras", json.dumps([{"file": str(model), "scale": 1.0}])]
    command += ["--base", str(base), "--out", str(out), "--start", start, "--config", "configs/tiny.yaml"]
    command += ["--prompts.source", "grammar", "--prompts.grammar", str(grammar), *UNMEASURED, *options]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def picture_errors(base: Path, runs: dict[str, Path], grammar: Path, prompts: int, more: int) -> dict[str, Tensor]:
    """Each picture's paired error by model on some prompts, and of the polished students on `more`."""
    saved = open_run(base / "distill")
    converted = {name: open_run(run / "distill") for name, run in runs.items()}
    origin = next(iter(converted.values())).origin
    parts = load_run_teacher(origin, CPU, torch.float32)
    teacher = Teacher(parts, origin.tail)
    source, sampler = GrammarSource(source="grammar", grammar=grammar), Sampler(guidance=3.0, steps=STEPS)
    reference = teacher_reference(teacher, distinct_texts(source, 3, prompts), 3, sampler, parts.native_size, (STEPS,))
    models = Models(saved, load_run_teacher(saved.origin, CPU, torch.float32), teacher)
    polished = {f"{name} + polish": load_student(one, parts) for name, one in converted.items()}
    students: dict[str, Student] = {
        "base": load_base_student(models),
        **{name: make_start(name, models).eval() for name in STARTS},
        **polished,
    }
    errors = {name: reference.picture_errors(student_field(student), STEPS) for name, student in students.items()}
    errors |= {"other noise": reference.ceiling, "floor": reference.floors[STEPS]}
    inputs = PairedInputs(
        teacher.encode_texts(distinct_texts(source, 4, more)),
        teacher.uncond,
        fixed_noises(4, more, parts.latent_shape()),
    )
    x0 = inputs.sample(teacher_field(teacher), sampler.for_teacher.model_copy(update={"steps": 2 * STEPS}))
    for name, student in polished.items():
        errors[f"{name}, more"] = relative_errors(inputs.sample(student_field(student), sampler), x0)
    return errors


def ratio_interval(of_seeds: Sequence[dict[str, Tensor]]) -> tuple[float, float, float]:
    """Polished delta over polished graft, of the means over all seeds, with the middle 95 % of resampled lists."""
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.zeros(RESAMPLES, dtype=torch.float64) for name in STARTS}
    for errors in of_seeds:
        count = len(errors["delta + polish, more"])
        rows = torch.randint(count, (RESAMPLES, count), generator=generator)
        for name in STARTS:
            sums[name] += errors[f"{name} + polish, more"].double()[rows].mean(1)
    low, high = (sums["delta"] / sums["graft"]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    means = [sum(float(errors[f"{name} + polish, more"].mean()) for errors in of_seeds) for name in STARTS]
    return means[0] / means[1], low, high


def main() -> None:
    """Make, convert, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of the base, such as runs/tiny")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--steps", type=int, default=800, help="steps of a fine-tune's own training")
    parser.add_argument("--prompts", type=int, default=96, help="prompts on which all are measured")
    parser.add_argument("--more", type=int, default=256, help="prompts of the ratio")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of sollune convert")
    args = parser.parse_args()
    table: dict[str, list[dict[str, Tensor]]] = {name: [] for name in args.only}
    seconds: dict[str, float] = {}
    for seed in args.seeds:
        for name in args.only:
            model = make(name, seed, args.out / "finetunes", args.steps)
            grammar = args.out / "finetunes" / f"{name}-{seed}.yaml"
            runs = {start: args.out / f"{name}-{seed}" / start for start in STARTS}
            for start, run in runs.items():
                seconds[f"{name}-{seed} {start}"] = convert(model, args.run, run, start, grammar, args.options)
            measured = args.out / f"{name}-{seed}" / f"errors-{args.prompts}-{args.more}.json"
            if not measured.exists():
                errors = picture_errors(args.run, runs, grammar, args.prompts, args.more)
                atomic_write(measured, json.dumps({key: value.tolist() for key, value in errors.items()}) + "\n")
            content = json.loads(measured.read_text(encoding="utf-8"))
            table[name].append({key: torch.tensor(values, dtype=torch.float64) for key, values in content.items()})
            row = ", ".join(f"{key} {float(value.mean()):.4f}" for key, value in table[name][-1].items())
            print(f"{name}-{seed}: {row}; seconds {seconds[f'{name}-{seed} delta']:.0f}", flush=True)
    results = {}
    for name, of_seeds in table.items():
        means = {key: [float(errors[key].mean()) for errors in of_seeds] for key in of_seeds[0]}
        ratio, low, high = ratio_interval(of_seeds)
        results[name] = {"errors": means, "ratio": ratio, "interval": [low, high]}
        row = " | ".join(f"{sum(values) / len(values):.3f}" for values in means.values())
        print(f"| {name} | {row} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")
    atomic_write(args.out / "convert.json", json.dumps({"table": results, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
