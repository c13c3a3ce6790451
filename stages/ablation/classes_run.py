"""One run of a study of `finetune-classes`: training from the distilled student, and the figures of its exam.

Runs whose settings give the same pictures of the classes share them: the first run draws them.
"""

import csv
import json
import statistics
from pathlib import Path

from shards.manifest import Manifest
from stages import finetune_classes
from stages.ablation.jobs import HASH_CHARACTERS, MEASURED_FILE, ClassesJob, hash_of
from stages.ablation.measuring import Measured
from stages.ablation.metrics import EXAM_KINDS, exam_metric
from stages.classes.specification import Priority
from stages.nets.run_folder import COMPLETE_MARK, open_run
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.disk import file_sha256
from stages.system.refusal import Refused
from stages.system.sharing import link, made_by_one
from stages.train.runtime import Runtime

TABLE_FILE = "per_class.csv"
PRIORITIES: tuple[Priority, ...] = ("top", "mid", "low")
PICTURE_SETTINGS = {"prompts", "seed", "count", "render", "pictures"}
"""Settings of the run on which the pictures of the classes depend, beside the class file, the teacher and the cache."""


def run_classes(job: ClassesJob) -> None:
    """Train and examine, unless that was done, and store the figures."""
    if not (job.run_folder / COMPLETE_MARK).is_file():
        config = job.finetune_classes
        runtime = Runtime(device_of(config.device), config.train.precision)
        with runtime.report_refusal_once():
            share_pictures(job)
            finetune_classes.finetune(config, runtime)
    saved = open_run(job.run_folder)
    figures = exam_figures(job.run_folder / TABLE_FILE)
    weights = file_sha256(saved.weights)[:HASH_CHARACTERS]
    measured = Measured(job.settings_hash(), weights, saved.samples, figures)
    atomic_write(job.home / MEASURED_FILE, json.dumps(vars(measured), indent=1) + "\n")


def share_pictures(job: ClassesJob) -> None:
    """Draw the pictures of the classes where no other run with the same ones did, and link the run to them."""
    config = finetune_classes.with_cache_sizes(job.finetune_classes)
    origin = open_run(job.home / "distill").origin
    recipe = Manifest.open(job.home / "cache").recipe.fingerprint()
    drawn = config.model_dump(mode="json", include=PICTURE_SETTINGS)
    made_from = {"classes": job.class_file, "teacher": dict(origin.teacher_sha256), "tail": origin.tail}
    shared = job.references / f"classes-{hash_of({**drawn, **made_from, 'cache': recipe})}"
    with made_by_one(shared):
        for name in job.linked:
            link(shared / name, job.home / name)
        finetune_classes.refill_class_cache(config.model_copy(update={"run": shared}), origin)
    link(job.run_folder / "cache", shared / "classes" / "cache")


def exam_figures(table: Path) -> dict[str, float]:
    """Means over the classes of each priority, over all of them, and of what is outside, before and after.

    Every class counts alike. Raises `Refused` for a table that cannot be read.
    """
    try:
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
        groups = {f"{name} classes": [row for row in rows if row["priority"] == name] for name in PRIORITIES}
        groups["all classes"] = [row for row in rows if row["priority"]]
        groups["outside"] = [row for row in rows if not row["priority"]]
        return {
            exam_metric(kind, group, when): statistics.fmean(float(row[f"{quantity}_{when}"]) for row in members)
            for kind, quantity in EXAM_KINDS.items()
            for group, members in groups.items()
            for when in ("after", "before")
            if members and f"{quantity}_{when}" in members[0]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{table}: is no table of classes ({error}) - remove {table.parent}; the run is then made again"
        ) from error
