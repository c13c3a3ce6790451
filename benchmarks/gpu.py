"""What one GPU does with every stage, in eight minutes: `python -m benchmarks.gpu [--dry] [--out gpu.json]`.

A teacher of SD1.5's size with random weights is made on the spot; then come, in the order of their worth, parts with a
budget each: stage one, stage two under each card's overlay, other loops and settings, what holds to the last bit, and
at the end what has to be compiled. Each is written into the JSON file as it ends, its figures even earlier, so that a
run that is cut off still tells; a part that fails is recorded with its error, and the next goes on. docs/gpu.md says
what each figure means. --dry runs every part on the CPU with the embedded teacher, to see that the script works.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu_process import Executor, InProcess, OwnProcess, run_parts
from benchmarks.gpu_report import Part, Report
from stages.system.ending import EXIT_INTERRUPTED, EXIT_REFUSED, print_error
from stages.system.refusal import Refused, did_you_mean
from stages.system.signals import interrupt_on

MINUTES, DRY_MINUTES, LEAST_MINUTES = 8.0, 30.0, 0.5
SECONDS_TO_END = 10.0
"""Kept at the end of a run for processes that have to be ended and for the folder to be removed."""
DRY_DEVICE, DRY_SCALE = "cpu", 20.0
"""A dry run is to end each part, however busy the CPU is; its budgets are of no use."""

PARTS = (
    Part("card", "what the card states and reaches on plain products", "benchmarks.gpu_card:describe", 30, 5),
    Part("teacher", "weights made, written and loaded", "benchmarks.gpu_world:load_teacher", 75, 20),
    Part("cache", "a small whole cache, to train from", "benchmarks.gpu_cache:make_small", 45, 10),
    Part("stage one, fp16", "eager, late steps in fp32", "benchmarks.gpu_cache:half_eager", 30, 12),
    Part("stage two, 80gb", "configs/cards/80gb.yaml", "benchmarks.gpu_training:overlay_80gb", 35, 12),
    Part("stage two, peers", "teacher in the loop, diffusers' loop", "benchmarks.gpu_training:peers", 60, 25),
    Part("stage one, fp32", "eager", "benchmarks.gpu_cache:single_eager", 30, 12),
    Part("stage two, 40gb", "configs/cards/40gb.yaml", "benchmarks.gpu_training:overlay_40gb", 30, 12),
    Part("stage two, 24gb", "configs/cards/24gb.yaml", "benchmarks.gpu_training:overlay_24gb", 35, 12),
    Part("stage two, settings", "Muon against AdamW, channels_last", "benchmarks.gpu_training:variants", 50, 25),
    Part("precisions", "velocities in bf16 and fp16 against fp32", "benchmarks.gpu_checks:precisions", 15, 8),
    Part("resume", "which tensors are equal after resuming", "benchmarks.gpu_checks:resume", 30, 12),
    Part("micro-batches", "accumulate 2 against the whole batch", "benchmarks.gpu_checks:micro_batches", 30, 12),
    Part("stage two, compiled", "torch.compile", "benchmarks.gpu_training:compiled", 120, 60, alone=True),
    Part("stage one, fp16, compiled", "torch.compile", "benchmarks.gpu_cache:half_compiled", 150, 75, alone=True),
    Part("stage one, fp32, compiled", "torch.compile", "benchmarks.gpu_cache:single_compiled", 120, 75, alone=True),
)
"""In the order of their worth; budgets are for eight minutes, and what a part leaves of its own is the later ones'."""
NEEDED = ("card", "teacher", "cache")
"""Run before any chosen part."""


def chosen_parts(names: Sequence[str], parts: Sequence[Part] = PARTS) -> list[Part]:
    """The parts of these names with those that they need; all of them without names."""
    known = [part.name for part in parts]
    for name in names:
        if name not in known:
            raise Refused(f"--only {name}: no such part - {did_you_mean(name, known)}")
    return [part for part in parts if not names or part.name in names or part.name in NEEDED]


def run(parts: Sequence[Part], out: Path, minutes: float, dry: bool, device: str = "auto") -> Report:
    """Run the parts and return the report, which is complete unless the run was interrupted."""
    # imported here, so that a machine without a GPU is refused before the libraries are loaded
    from benchmarks.gpu_world import Settings

    facts = {"began": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "dry": dry, "minutes": minutes}
    report = Report(out, parts, facts)
    with (
        interrupt_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        TemporaryDirectory(prefix="sollune-gpu-") as folder,
    ):
        settings = Settings(dry, folder, device)
        executor: Executor = InProcess(settings) if dry else OwnProcess(settings)
        try:
            scale = DRY_SCALE if dry else max(1.0, minutes / MINUTES)
            run_parts(parts, report, executor, 60 * minutes - SECONDS_TO_END, scale)
        except BaseException:
            report.close("cut off")
            raise
        finally:
            executor.close()
    report.close("complete")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """0 when no part failed, 1 when one did, 2 for a wrong call or a machine without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="every part on the CPU, with the embedded teacher")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file (gpu.json)")
    parser.add_argument(
        "--minutes", type=float, help="for the whole run at most (8; dry 30, and it takes less than one)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="this part, and what it needs")
    options = parser.parse_args(argv)
    minutes = options.minutes if options.minutes is not None else (DRY_MINUTES if options.dry else MINUTES)
    try:
        parts = chosen_parts(options.only)
        if not minutes >= LEAST_MINUTES:
            raise Refused(f"--minutes {minutes:g}: too few for any part - take {LEAST_MINUTES:g} or more")
        if not (options.dry or torch.cuda.is_available()):
            raise Refused("no GPU here that torch can use - run this on a machine with one, or with --dry on the CPU")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        report = run(parts, options.out, minutes, options.dry, DRY_DEVICE if options.dry else "cuda:0")
    except Refused as refusal:
        return print_error(str(refusal), EXIT_REFUSED)
    except KeyboardInterrupt:
        return print_error(f"interrupted - {options.out} holds what was measured", EXIT_INTERRUPTED)
    for name, status in report.statuses.items():
        print(f"{status:12} {name}")
    print(f"{options.out}: written")
    return 1 if {"failed", "killed"} & set(report.statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
