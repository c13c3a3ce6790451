"""Does a change of distillation help? Arms of the same budget, paired by seed: `python -m benchmarks.arms RUN`.

    python -m benchmarks.arms runs/tiny --option david.fusion.formula --values static relative --seeds 3
    python -m benchmarks.arms runs/tiny --option config --values configs/ablation/adamw_32.yaml configs/tiny.yaml

The cache of RUN is shared; each arm and seed is a run of its own in FOLDER (default RUN/arms), which goes on where it
was left, and is measured once. The first value is the control. Printed: each figure's difference to the control with
its 95 % interval over the seeds.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from configs.load import load
from stages import distill
from stages.evaluate import measure

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""The .975 quantile for n seeds."""
SMALL_EVALUATION = [
    *("--paired.prompts", "512", "--paired.steps", "8", "--paired.controls", "false"),
    *("--fidelity.prompts", "100", "--fidelity.control-prompts", "2"),
]


def read_metrics(folder: Path) -> dict[str, float]:
    """The figures of a run that was measured."""
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    figures = {"velocity error": evaluation["velocity"]["velocity"]["overall"]}
    figures["guidance error"] = evaluation["velocity"]["guidance"]["overall"]
    figures["paired error at 8 steps"] = evaluation["paired"]["student"][0]["student"]
    return figures


def run(home: Path, cache: Path, files: list[Path], words: list[str]) -> dict[str, float]:
    """Distil and measure one arm with one seed, unless that was done already."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "cache").exists():
        (home / "cache").symlink_to(cache.resolve())
    folder = home / "distill"
    if not (folder / "evaluation.json").exists():
        distill.run(load(distill.Config, "distill", files, ["--run", str(home), *words]))
        measure.main([str(folder), *(word for file in files for word in ("--config", str(file))), *SMALL_EVALUATION])
    return read_metrics(folder)


def difference_text(arm: list[float], control: list[float]) -> str:
    """Mean paired difference, its 95 % interval, and both as shares of the control."""
    differences = [one - other for one, other in zip(arm, control, strict=True)]
    mean, base = statistics.mean(differences), statistics.mean(control)
    half = STUDENT_T[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.5f} +- {half:.5f} ({mean / base:+.1%} +- {half / base:.1%})"


def main() -> int:
    """Run every arm, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder whose cache is used")
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("configs/tiny.yaml")])
    parser.add_argument(
        "--option", default="david.fusion.formula", help="what differs between the arms; config: a YAML file"
    )
    parser.add_argument("--values", nargs="+", default=["static", "relative"], help="the control first")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(STUDENT_T))
    parser.add_argument("--folder", type=Path, help="where the arms lie (default: RUN/arms)")
    options, rest = parser.parse_known_args()
    home = options.folder or options.run / "arms"
    figures: dict[str, list[dict[str, float]]] = {value: [] for value in options.values}
    for seed in range(options.seeds):
        for value in options.values:
            files, words = options.config, [f"--{options.option}", value]
            if options.option == "config":
                files, words = [*options.config, Path(value)], []
            words += ["--train.seed", str(seed), *rest]
            figures[value].append(run(home / f"{Path(value).stem}{seed}", options.run / "cache", files, words))
            print(f"{value}, seed {seed}: {figures[value][-1]}", file=sys.stderr)
    control = options.values[0]
    print(f"\n{options.option}, {options.seeds} seeds\n")
    print(f"| figure | {control} | arm | difference to {control} |\n|---|---|---|---|")
    for name in figures[control][0]:
        base = [one[name] for one in figures[control]]
        for value in options.values[1:]:
            difference = difference_text([one[name] for one in figures[value]], base)
            print(f"| {name} | {statistics.mean(base):.5f} | {value} | {difference} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
