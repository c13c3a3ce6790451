"""Do priorities make classes better, and nothing worse? `python -m benchmarks.classes RUN --classes FILE --seeds 5`.

    sollune classes suggest runs/tiny/distill --config configs/tiny.yaml --out suggested.yaml
    python -m benchmarks.classes runs/tiny --classes suggested.yaml --seeds 5 --steps 8 --pictures 200

Arms of the same budget, paired by seed: `priorities` (the class file as it is) and `even` (all its classes have the
same weight), each from the distilled student of RUN, which is the arm `before`. A seed decides the generated pictures,
the order of training, and the prompts and noises of the exam, which are the same for all arms. Each arm and seed is a
run of its own in FOLDER (default RUN/classes_arms), which resumes where it stopped; it is measured again only if the
options change. Further options go to finetune-classes.

Printed: the share of pictures that show every attribute of their prompt, by the scorer, with the paired difference over
the seeds and its 95 % interval: of the top classes together, each class, the other class with the worst mean, and
prompts outside all classes.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from configs.load import load
from stages import finetune_classes
from stages.ablation.verdicts import Difference
from stages.classes.selection import OUTSIDE_LABEL
from stages.classes.specification import ClassFile, load_classes
from stages.system.atomic import atomic_write

ARMS = ("priorities", "even")
Shares = dict[str, float]
"""Class -> share of pictures that show every attribute of their prompt."""


@dataclass(frozen=True)
class ArmResult:
    """One arm with one seed: the same exam of the distilled and of the finetuned student."""

    before: Shares
    after: Shares

    @classmethod
    def read(cls, table: Path) -> "ArmResult":
        """From per_class.csv."""
        with open(table, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return cls(*({row["class"]: float(row[f"all_{when}"]) for row in rows} for when in ("before", "after")))


def with_equal_weights(classes: ClassFile) -> ClassFile:
    """The same classes with equal weights."""
    return classes.model_copy(
        update={"classes": tuple(spec.model_copy(update={"weight": 1.0}) for spec in classes.classes)}
    )


def prepare(home: Path, run: Path) -> None:
    """A run folder with the cache and the distilled student of another."""
    home.mkdir(parents=True, exist_ok=True)
    for part in ("cache", "distill"):
        if not (home / part).exists():
            (home / part).symlink_to((run / part).resolve())


def finetune(home: Path, run: Path, files: Sequence[Path], overrides: Sequence[str]) -> ArmResult:
    """Fine-tune and measure one arm with one seed, unless that was done with these very overrides."""
    prepare(home, run)
    done, table = home / "measured.json", home / "classes" / "per_class.csv"
    if not done.exists() or json.loads(done.read_text(encoding="utf-8")) != list(overrides):
        finetune_classes.run(
            load(finetune_classes.Config, "finetune_classes", list(files), ["--run", str(home), *overrides])
        )
        atomic_write(done, json.dumps(list(overrides)) + "\n")
    return ArmResult.read(table)


def points_text(apart: Sequence[float]) -> str:
    """Mean of paired differences in points, with its 95 % interval where there is one."""
    difference = Difference.paired(apart, [0.0] * len(apart))
    own = difference.interval
    return f"{100 * difference.mean:+.2f}" + ("" if own is None else f" +- {100 * (own.high - difference.mean):.2f}")


def difference_text(arm: Sequence[float], control: Sequence[float]) -> str:
    """Mean paired difference, its 95 % interval where there is one, and both as shares of the control."""
    difference, base = Difference.paired(arm, control), statistics.mean(control)
    mean, own = difference.mean, difference.interval
    if own is None:
        return f"{mean:+.5f} ({mean / base:+.1%})"
    half = own.high - mean
    return f"{mean:+.5f} +- {half:.5f} ({mean / base:+.1%} +- {half / base:.1%})"


def report(classes: ClassFile, results: dict[str, list[ArmResult]]) -> str:
    """The table in Markdown."""
    tops = [spec.name for spec in classes.classes if spec.priority == "top"]
    others = [spec.name for spec in classes.classes if spec.priority != "top"]
    before = [one.before for one in results["priorities"]]
    gains = {name: [one.after[name] - one.before[name] for one in results["priorities"]] for name in others}
    rows = [("top classes", tops), *((f"{name} (top)", [name]) for name in tops)]
    rows += [(name, [name]) for name in others]
    if others:
        worst = min(others, key=lambda name: statistics.mean(gains[name]))
        rows.append((f"worst other class: {worst}", [worst]))
    if OUTSIDE_LABEL in before[0]:
        rows.append(("outside of all classes", [OUTSIDE_LABEL]))

    def mean(shares: Shares, names: Sequence[str]) -> float:
        return statistics.mean(shares[name] for name in names)

    lines = [
        "| all at once | before | even | priorities | priorities - before | even - before | priorities - even |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, names in rows:
        first, control, arm = (
            [mean(one, names) for one in shares]
            for shares in (before, [one.after for one in results["even"]], [one.after for one in results["priorities"]])
        )
        shown = " | ".join(f"{100 * statistics.mean(values):.2f}" for values in (first, control, arm))
        pairs = ((arm, first), (control, first), (arm, control))
        apart = " | ".join(points_text([a - b for a, b in zip(one, other, strict=True)]) for one, other in pairs)
        lines.append(f"| {label} | {shown} | {apart} |")
    if len(before) > 1:
        top = {arm: [mean(one.after, tops) for one in results[arm]] for arm in ARMS}
        lines += ["", f"top classes, priorities against even: {difference_text(top['priorities'], top['even'])}"]
    return "\n".join(lines)


def exam_options(args: argparse.Namespace) -> list[str]:
    """The exam's settings as options of finetune-classes."""
    exam = {"pictures": args.pictures, "sampler.steps": args.steps, "sampler.guidance": args.guidance}
    return [part for name, value in exam.items() for part in (f"--exam.{name}", str(value))]


def options(description: str | None) -> argparse.ArgumentParser:
    """The common options of both benchmarks of class finetuning."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder whose cache and distilled student are used")
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("configs/tiny.yaml")])
    parser.add_argument("--steps", type=int, default=8, help="steps of the exam's sampler")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale of the exam")
    parser.add_argument("--pictures", type=int, default=100, help="pictures of each class from held-out prompts")
    parser.add_argument("--folder", type=Path, help="folder of the arms")
    return parser


def main() -> int:
    """Run every arm with every seed, then print the table."""
    parser = options(__doc__)
    parser.add_argument("--classes", type=Path, default=Path("configs/classes/tiny.yaml"))
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11))
    args, rest = parser.parse_known_args()
    home = args.folder or args.run / "classes_arms"
    classes = load_classes(args.classes)
    home.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[ArmResult]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        for arm in ARMS:
            file = home / f"{arm}.yaml"
            chosen = classes if arm == "priorities" else with_equal_weights(classes)
            atomic_write(file, yaml.safe_dump(chosen.model_dump(mode="json", exclude_none=True), sort_keys=False))
            overrides = [
                "--classes",
                str(file),
                "--seed",
                str(seed),
                "--train.seed",
                str(seed),
                "--exam.seed",
                str(seed),
            ]
            results[arm].append(
                finetune(home / f"{arm}{seed}", args.run, args.config, [*overrides, *exam_options(args), *rest])
            )
            print(f"{arm}, seed {seed}: {results[arm][-1]}", file=sys.stderr)
    print(f"\n{args.seeds} seeds, {args.pictures} pictures a class, {args.steps} steps, guidance {args.guidance}\n")
    print(report(classes, results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
