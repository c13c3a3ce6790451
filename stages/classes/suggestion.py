"""`sollune classes suggest RUN`: a class file with priorities from measurements, to be edited by hand."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ConfigDict, Field, ImportString
from rich.markup import escape
from rich.table import Table

from configs.values import Strict
from shards.reader import Reader
from stages.classes.cached import load_run_assessor, measure_cache_errors, records_by_class
from stages.classes.class_plan import column_table, wide_console
from stages.classes.difficulty import ClassDifficulty, probe_classes, rank_classes
from stages.classes.selection import search_prompts
from stages.classes.specification import ClassFile, ClassSpec
from stages.evaluate.metrics import refuse_blind_scorer
from stages.nets.run_folder import cache_folder, load_run_teacher, load_student, open_run
from stages.nets.teacher import Teacher
from stages.prompts import PromptSource
from stages.sampling.few_steps import refuse_few_steps
from stages.sampling.sampler import Sampler
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused

YAML_HEADER = """\
# Suggested by `sollune classes suggest {config.run}` from {config.probe} pictures of each class
# ({config.sampler.steps} steps, seed {config.seed}) and up to {config.records} of its cached records. To be edited.
#   ± and (-): one standard error; errors are relative, geometric means, but for David's
#   part: the class's part of all error over an even part, error x share of the cache, with one standard error
#   top: part above 1 by more than its standard error, or more pictures lost to the teacher than two standard errors
#   low: part below 1 by more than its standard error; mid: the rest, which the measurement cannot tell from 1
"""


class Config(Strict):
    """Measure which classes of a run are hardest, and write a class file; --config takes its evaluate section."""

    model_config = ConfigDict(extra="ignore")  # the section has more keys than this command needs

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    prompts: PromptSource = Field(description="where the sentences come from; its validation share is left to the exam")
    seed: int = Field(1, description="seed of prompts and noises")
    scorer: ImportString[Any] | None = Field(
        None, description="function (texts, pictures) -> attribute -> shown or not; none: compare with the teacher only"
    )
    level: int = Field(1, ge=1, description="depth of a class in the hierarchy: 1 makes star/*, 2 makes star/red")
    probe: int = Field(32, ge=2, description="pictures of each class, by student and teacher each")
    records: int = Field(16, ge=2, description="most records of the cache of each class")
    sampler: Sampler = Field(Sampler(steps=8), description="how the pictures are sampled")
    out: Path | None = Field(None, description="class file to write; none takes RUN/suggested-classes.yaml")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")


def run(config: Config) -> None:
    """Measure, print the table and write the file; raises `Refused` where it exists."""
    out = config.out or config.run / "suggested-classes.yaml"
    refuse_existing(out)
    device_of(config.device)  # refused before the run is read, which takes longer
    refuse_unwritable(out)
    difficulties = measure_classes(config)
    wide_console().print(difficulty_table(difficulties))
    refuse_existing(out)
    atomic_write(out, to_yaml(difficulties, config))
    print(f"{out}: written, to be edited by hand; look at it with sollune classes show {out}")


def refuse_existing(out: Path) -> None:
    """Raise `Refused` rather than overwrite a file that may have been edited."""
    if out.exists():
        raise Refused(f"{out}: is there already and may have been edited - name another file with --out, or remove it")


def measure_classes(config: Config) -> list[ClassDifficulty]:
    """All classes of the run's cache, the hardest first."""
    saved = open_run(config.run)
    refuse_few_steps(saved, "a suggestion of classes")
    cache = cache_folder(saved.folder)
    classes = group_by_level(records_by_class(cache), config.level)
    if len(classes) < 2:
        raise Refused(f"--level {config.level}: {cache} holds one class there, {min(classes)!r} - go deeper")
    specs = tuple(ClassSpec(name=pattern, pattern=pattern, priority="mid") for pattern in classes)
    # Not of the validation share: a class chosen for a bad sample of it would seem to gain in the next exam.
    quotas = dict.fromkeys(classes, config.probe)
    prompts = search_prompts(config.prompts, config.seed, "train", ClassFile(classes=specs), quotas).prompts
    teacher = Teacher(load_run_teacher(saved.origin, device_of(config.device), torch.float32), saved.origin.tail)
    student, uncond = load_student(saved, teacher.components), teacher.uncond
    assessor = load_run_assessor(saved, student, uncond.device, teacher.components.schedule.steps)
    cached = measure_cache_errors(student, Reader(cache, "train"), classes, uncond, config.records, assessor)
    native = teacher.components.native_size
    size = saved.origin.main_size(native)
    if config.scorer is not None and size != native:
        text = next(iter(prompts.values()))[0].text
        refuse_blind_scorer(config.scorer, text, size, "leave --scorer out with --scorer none")
    probed = probe_classes(student, teacher, prompts, config.seed, config.sampler, config.scorer, size)
    return rank_classes(list(classes), [len(numbers) for numbers in classes.values()], probed, cached)


def group_by_level(records: Mapping[str, Sequence[int]], level: int) -> dict[str, list[int]]:
    """Pattern -> its records, for patterns that take the first `level` parts of the class names; in order of name."""
    groups: dict[str, list[int]] = {}
    for name in sorted(records):
        parts = name.split("/")
        pattern = glob.escape("/".join(parts[:level])) + ("/*" if len(parts) > level else "")
        groups.setdefault(pattern, []).extend(records[name])
    return {pattern: sorted(numbers) for pattern, numbers in groups.items()}


def difficulty_table(difficulties: Sequence[ClassDifficulty]) -> Table:
    """A row for each class, the hardest first."""
    lost = [one.lost_share for one in difficulties if one.lost_share]
    david = [one.david_difficulty for one in difficulties if one.david_difficulty]
    table = column_table(
        {"class": [escape(one.pattern) for one in difficulties], "": [one.priority for one in difficulties]},
        {
            "part of all": [one.share_text for one in difficulties],
            "paired": [str(one.paired_error) for one in difficulties],
            "pooled": [str(one.pooled_error) for one in difficulties],
            "velocity": [str(one.velocity_error) for one in difficulties],
            "David": list(map(str, david)) or None,
            "lost %": [f"{100 * one.value:.0f} ± {100 * one.standard_error:.0f}" for one in lost] or None,
            "records": [str(one.cached_records) for one in difficulties],
        },
    )
    table.caption = "± and (-): one standard error; errors (paired, pooled, velocity) are relative, geometric means"
    return table


def to_yaml(difficulties: Sequence[ClassDifficulty], config: Config) -> str:
    """The class file, with the measurements in comments."""
    lines = [YAML_HEADER.format(config=config) + "weights: {top: 4, mid: 2, low: 1}", "classes:"]
    for one in difficulties:
        measured = [f"part {one.share_text}", f"paired error {one.paired_error}, pooled {one.pooled_error}"]
        measured += [f"velocity error {one.velocity_error}"]
        measured += [f"David {one.david_difficulty}"] if one.david_difficulty else []
        measured += [f"lost {one.lost_share}"] if one.lost_share else []
        entry = {"name": one.pattern, "pattern": one.pattern, "priority": one.priority}
        flow = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
        lines += [f"  # {'; '.join(measured)}; {one.cached_records} records", f"  - {flow.strip()}"]
    return "\n".join(lines) + "\n"
