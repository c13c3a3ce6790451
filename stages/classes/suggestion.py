"""`sollune classes suggest RUN`: a class file whose priorities follow from what was measured, to be edited by hand."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ConfigDict, Field, ImportString
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from configs.values import Strict
from shards.reader import Reader
from stages.classes import ClassFile, ClassSpec, class_prompts
from stages.classes.cached import load_run_assessor, measure_cache_errors, records_by_class
from stages.classes.difficulty import ClassDifficulty, probe_classes, rank_classes
from stages.classes.plan import wide_console
from stages.nets.saved import cache_folder, load_run_teacher, load_student, open_run
from stages.nets.teacher import Teacher
from stages.prompts import PromptSource
from stages.sampling.sampler import Sampler
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused


class Config(Strict):
    """Measure which classes of a run need it most, and write a class file; --config takes its evaluate section."""

    model_config = ConfigDict(extra="ignore")  # the section says much more than this command asks

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    prompts: PromptSource = Field(description="where the sentences come from; its validation share is left to the exam")
    seed: int = Field(1, description="seed of prompts and noises")
    scorer: ImportString[Any] | None = Field(
        None, description="function (texts, pictures) -> attribute -> shown or not; none compares with the teacher only"
    )
    level: int = Field(1, ge=1, description="depth of a class in the hierarchy: 1 makes star/*, 2 makes star/red")
    probe: int = Field(32, ge=2, description="pictures drawn of each class, by student and teacher each")
    records: int = Field(16, ge=2, description="most records of the cache looked at of each class")
    sampler: Sampler = Field(Sampler(steps=8), description="how the pictures are drawn")
    out: Path | None = Field(None, description="class file to write; none takes RUN/suggested-classes.yaml")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")


def run(config: Config) -> None:
    """Measure, print the table and write the file; raises `Refused` where one lies already."""
    out = config.out or config.run / "suggested-classes.yaml"
    refuse_existing(out)
    device_of(config.device)  # refused before the run is read, which takes longer
    refuse_unwritable(out)
    found = measure_classes(config)
    wide_console().print(difficulty_table(found))
    refuse_existing(out)
    atomic_write(out, to_yaml(found, config))
    print(f"{out}: written, to be edited by hand; look at it with sollune classes show {out}")


def refuse_existing(out: Path) -> None:
    """Raise `Refused` rather than lose what somebody may have edited."""
    if out.exists():
        raise Refused(f"{out}: is there already and may have been edited - name another file with --out, or remove it")


def measure_classes(config: Config) -> list[ClassDifficulty]:
    """The needs of all classes of the run's cache."""
    saved = open_run(config.run)
    cache = cache_folder(saved.folder)
    classes = group_by_level(records_by_class(cache), config.level)
    if len(classes) < 2:
        raise Refused(f"--level {config.level}: {cache} holds one class there, {min(classes)!r} - go deeper")
    specs = tuple(ClassSpec(name=pattern, pattern=pattern, priority="mid") for pattern in classes)
    # Not of the validation share: a class chosen for a bad sample of it would seem to gain when it is examined again.
    asked = class_prompts(
        config.prompts, config.seed, "train", ClassFile(classes=specs), dict.fromkeys(classes, config.probe)
    )
    teacher = Teacher(load_run_teacher(saved.origin, device_of(config.device), torch.float32), saved.origin.tail)
    student, uncond = load_student(saved, teacher.components), teacher.uncond
    judge = load_run_assessor(saved, uncond.device, teacher.components.schedule.steps)
    cached = measure_cache_errors(student, Reader(cache, "train"), classes, uncond, config.records, judge)
    probed = probe_classes(student, teacher, asked, config.seed, config.sampler, config.scorer)
    return rank_classes(list(classes), [len(numbers) for numbers in classes.values()], probed, cached)


def group_by_level(records: Mapping[str, Sequence[int]], level: int) -> dict[str, list[int]]:
    """Pattern -> its records, for patterns that take the first `level` parts of the class names; in order of name."""
    found: dict[str, list[int]] = {}
    for name in sorted(records):
        parts = name.split("/")
        pattern = glob.escape("/".join(parts[:level])) + ("/*" if len(parts) > level else "")
        found.setdefault(pattern, []).extend(records[name])
    return {pattern: sorted(numbers) for pattern, numbers in found.items()}


def difficulty_table(difficulties: Sequence[ClassDifficulty]) -> Table:
    """A row for each class, the neediest first."""
    shown = Table(
        box=SIMPLE,
        pad_edge=False,
        caption="± and (-): one standard error; errors (paired, pooled, velocity) are relative, geometric means",
        caption_justify="left",
    )
    shown.add_column("class", overflow="fold")
    shown.add_column("")
    heads = ["part of all", "paired", "pooled", "velocity"]
    heads += ["David"] if difficulties[0].david_difficulty else []
    heads += ["lost %"] if difficulties[0].lost_share else []
    for head in (*heads, "records"):
        shown.add_column(head, justify="right", overflow="fold")
    for need in difficulties:
        cells = [need.share_text, *(f"{one}" for one in (need.paired_error, need.pooled_error, need.velocity_error))]
        cells += [f"{need.david_difficulty}"] if need.david_difficulty else []
        cells += (
            [f"{100 * need.lost_share.value:.0f} ± {100 * need.lost_share.standard_error:.0f}"]
            if need.lost_share
            else []
        )
        shown.add_row(escape(need.pattern), need.priority, *cells, str(need.cached_records))
    return shown


YAML_HEADER = """\
# Suggested by `sollune classes suggest {run}` from {probe} pictures of each class ({steps} steps, seed {seed})
# and up to {records} of its cached records. To be edited by hand: this is only where to begin.
#   ± and (-): one standard error; errors are relative, geometric means, but for what David says
#   part: the class's part of all error over an even part, need x share of the cache, with one standard error
#   top: part above 1 by more than its standard error, or more pictures lost to the teacher than two standard errors
#   low: part below 1 by more than its standard error; mid: the rest, which the measurement cannot tell from 1
"""


def to_yaml(difficulties: Sequence[ClassDifficulty], config: Config) -> str:
    """The class file, with what was measured in comments."""
    head = YAML_HEADER.format(
        run=config.run, probe=config.probe, records=config.records, steps=config.sampler.steps, seed=config.seed
    )
    lines = [head + "weights: {top: 4, mid: 2, low: 1}", "classes:"]
    for need in difficulties:
        said = [f"part {need.share_text}", f"paired error {need.paired_error}, pooled {need.pooled_error}"]
        said += [f"velocity error {need.velocity_error}"]
        said += [f"David {need.david_difficulty}"] if need.david_difficulty else []
        said += [f"lost {need.lost_share}"] if need.lost_share else []
        entry = {"name": need.pattern, "pattern": need.pattern, "priority": need.priority}
        flow = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
        lines += [f"  # {'; '.join(said)}; {need.cached_records} records", f"  - {flow.strip()}"]
    return "\n".join(lines) + "\n"
