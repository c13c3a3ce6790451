"""Do priorities make classes better, and nothing worse? `python -m benchmarks.classes RUN --classes FILE --seeds 5`.

    sollune classes suggest runs/tiny/distill --config configs/tiny.yaml --out suggested.yaml
    python -m benchmarks.classes runs/tiny --classes suggested.yaml --seeds 5 --steps 8 --pictures 200

Arms of the same budget, paired by seed: `priorities` (the class file as it is) and `even` (all its classes weigh the
same), each from the distilled student of RUN, which is the arm `before`. A seed decides the pictures that are painted,
the order of training, and the prompts and noises of the exam; the exam asks all arms the same. Each arm and seed is a
run of its own in FOLDER (default RUN/classes_arms), which goes on where it was left; what was measured once is not
measured again unless the exam changes. Further options go to finetune-classes.

Printed: the judge's share of pictures that show all that was said, its paired difference over the seeds with a 95 %
interval, for the top classes together, each class, the other class that does worst on average, and prompts outside of
all.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.arms import STUDENT_T, difference_text
from configs.load import load
from stages import finetune_classes
from stages.classes import OUTSIDE_LABEL, ClassFile, load_classes
from stages.system.atomic import atomic_write

ARMS = ("priorities", "even")
Shares = dict[str, float]
"""Class -> share of pictures that show all that was said."""


@dataclass(frozen=True)
class ArmResult:
    """One arm with one seed: the distilled student and the finetuned one, asked the same."""

    before: Shares
    after: Shares

    @classmethod
    def read(cls, table: Path) -> "ArmResult":
        """What per_class.csv says."""
        with open(table, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return cls(*({row["class"]: float(row[f"all_{when}"]) for row in rows} for when in ("before", "after")))


def with_equal_weights(classes: ClassFile) -> ClassFile:
    """The same classes, none of which matters more."""
    return classes.model_copy(
        update={"classes": tuple(spec.model_copy(update={"weight": 1.0}) for spec in classes.classes)}
    )


def prepare(home: Path, run: Path) -> None:
    """A run folder with the cache and the distilled student of another."""
    home.mkdir(parents=True, exist_ok=True)
    for part in ("cache", "distill"):
        if not (home / part).exists():
            (home / part).symlink_to((run / part).resolve())


def finetune(home: Path, run: Path, files: Sequence[Path], words: Sequence[str]) -> ArmResult:
    """Fine-tune and measure one arm with one seed, unless that was done with these very words."""
    prepare(home, run)
    done, table = home / "measured.json", home / "classes" / "per_class.csv"
    if not done.exists() or json.loads(done.read_text(encoding="utf-8")) != list(words):
        finetune_classes.run(
            load(finetune_classes.Config, "finetune_classes", list(files), ["--run", str(home), *words])
        )
        atomic_write(done, json.dumps(list(words)) + "\n")
    return ArmResult.read(table)


def points_text(apart: Sequence[float]) -> str:
    """Mean of paired differences in points, with its 95 % interval where there are several."""
    if len(apart) < 2:
        return f"{100 * apart[0]:+.2f}"
    half = STUDENT_T[len(apart)] * statistics.stdev(apart) / math.sqrt(len(apart))
    return f"{100 * statistics.mean(apart):+.2f} +- {100 * half:.2f}"


def report(classes: ClassFile, found: dict[str, list[ArmResult]]) -> str:
    """The table in Markdown."""
    tops = [spec.name for spec in classes.classes if spec.priority == "top"]
    others = [spec.name for spec in classes.classes if spec.priority != "top"]
    before = [one.before for one in found["priorities"]]
    gains = {name: [m.after[name] - m.before[name] for m in found["priorities"]] for name in others}
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
            for shares in (before, [m.after for m in found["even"]], [m.after for m in found["priorities"]])
        )
        shown = " | ".join(f"{100 * statistics.mean(values):.2f}" for values in (first, control, arm))
        pairs = ((arm, first), (control, first), (arm, control))
        apart = " | ".join(points_text([a - b for a, b in zip(one, other, strict=True)]) for one, other in pairs)
        lines.append(f"| {label} | {shown} | {apart} |")
    if len(before) > 1:
        top = {arm: [mean(m.after, tops) for m in found[arm]] for arm in ARMS}
        lines += ["", f"top classes, priorities against even: {difference_text(top['priorities'], top['even'])}"]
    return "\n".join(lines)


def exam_options(args: argparse.Namespace) -> list[str]:
    """The exam's settings as options of finetune-classes."""
    told = {"pictures": args.pictures, "sampler.steps": args.steps, "sampler.guidance": args.guidance}
    return [word for name, value in told.items() for word in (f"--exam.{name}", str(value))]


def options(description: str | None) -> argparse.ArgumentParser:
    """What both benchmarks of story three can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder whose cache and distilled student are used")
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("configs/tiny.yaml")])
    parser.add_argument("--steps", type=int, default=8, help="steps of the exam's sampler")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale of the exam")
    parser.add_argument("--pictures", type=int, default=100, help="held-out pictures asked of each class")
    parser.add_argument("--folder", type=Path, help="where the arms lie")
    return parser


def main() -> int:
    """Run every arm with every seed, then print the table."""
    parser = options(__doc__)
    parser.add_argument("--classes", type=Path, default=Path("configs/classes/tiny.yaml"))
    parser.add_argument("--seeds", type=int, default=5, choices=[1, *sorted(STUDENT_T)])
    asked, rest = parser.parse_known_args()
    home = asked.folder or asked.run / "classes_arms"
    classes = load_classes(asked.classes)
    home.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[ArmResult]] = {arm: [] for arm in ARMS}
    for seed in range(asked.seeds):
        for arm in ARMS:
            file = home / f"{arm}.yaml"
            chosen = classes if arm == "priorities" else with_equal_weights(classes)
            atomic_write(file, yaml.safe_dump(chosen.model_dump(mode="json", exclude_none=True), sort_keys=False))
            words = ["--classes", str(file), "--seed", str(seed), "--train.seed", str(seed), "--exam.seed", str(seed)]
            found[arm].append(
                finetune(home / f"{arm}{seed}", asked.run, asked.config, [*words, *exam_options(asked), *rest])
            )
            print(f"{arm}, seed {seed}: {found[arm][-1]}", file=sys.stderr)
    print(f"\n{asked.seeds} seeds, {asked.pictures} pictures a class, {asked.steps} steps, guidance {asked.guidance}\n")
    print(report(classes, found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
