"""One run of a study in a process of its own: `python -m stages.ablation.worker JOB.json`; it goes on where it was."""

import json
import sys
from pathlib import Path

from shards.manifest import Manifest
from stages import distill
from stages.ablation.classes_run import run_classes
from stages.ablation.defects import alteration_of
from stages.ablation.jobs import ClassesJob, DistillJob, Job, read_job
from stages.ablation.measuring import Measured, measure
from stages.nets.run_folder import COMPLETE_MARK, Origin
from stages.system.device import device_of
from stages.system.ending import run_to_exit_code
from stages.system.terminal import prepare_streams, quiet_libraries
from stages.train.runtime import Runtime


def run_job(job: Job) -> None:
    """Train, unless that was done, and measure."""
    if Measured.read(job) is not None:
        return
    if isinstance(job, ClassesJob):
        run_classes(job)
    else:
        run_distillation(job)
    if (measured := Measured.read(job)) is not None:
        print(json.dumps(dict(measured.figures), indent=1))


def run_distillation(job: DistillJob) -> None:
    """Train, unless that was done, and measure."""
    if job.trains and not (job.run_folder / COMPLETE_MARK).is_file():
        config = job.distill
        runtime = Runtime(device_of(config.device), config.train.precision)
        with runtime.report_refusal_once():
            distill.distill(config, runtime, alteration_of(job.defects))
    measure(job, Origin.from_manifest(Manifest.open(job.home / "cache"), job.distill.teacher, job.distill.target))


def main() -> int:
    """The process's exit code."""
    prepare_streams()
    quiet_libraries()
    file = Path(sys.argv[1])

    def action() -> int:
        run_job(read_job(file))
        return 0

    return run_to_exit_code(action, sys.argv[1:], lambda: file.parent)


if __name__ == "__main__":
    sys.exit(main())
