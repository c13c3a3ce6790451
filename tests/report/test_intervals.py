"""Laws of the mean over seeds: runs that a study makes of one arm become one line, and no others do."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.load import resolved_yaml
from stages.ablation.jobs import JOB_FILE, ClassesJob, DistillJob, Job
from stages.ablation.plan import make_plan
from stages.ablation.study import load_study
from stages.report import records
from stages.report.intervals import group_by_settings
from stages.report.page import make_page
from stages.report.records import read_run
from tests.report.made_runs import make_run

GOLDEN = Path("tests/golden/data")
SEEDS = 3


def jobs_of(folder: Path, **content: Any) -> Sequence[Job]:
    """Of a small study, every arm in as many seeds."""
    file = folder / "study.yaml"
    arms = {name: {"title": name, **arm} for name, arm in content.pop("arms").items()}
    first, *others = arms
    study = {
        "title": "made for a test", "files": ["configs/tiny.yaml"], "samples": 8, "seeds": SEEDS, "arms": arms,
        "comparisons": [{"arms": others, "against": [first]}], "regimes": {"only": {"title": "only"}}, **content,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(study))
    return make_plan(load_study(file), file, GOLDEN, folder / "out", "cpu").jobs


def make(job: Job, with_job: bool = True) -> Path:
    """What the run of a job leaves behind."""
    classes = isinstance(job, ClassesJob)
    folder = make_run(job.run_folder, seed=job.seed, classes=classes)
    if isinstance(job, ClassesJob):
        (folder / "config.yaml").write_text(resolved_yaml(job.finetune_classes, "finetune_classes"))
        shutil.copy(job.finetune_classes.classes, folder / "classes.yaml")
    elif isinstance(job, DistillJob):
        (folder / "config.yaml").write_text(resolved_yaml(job.distill, "distill"))
    if with_job:
        (job.home / JOB_FILE).write_text(job.model_dump_json())
    return folder


def groups_of(jobs: Sequence[Job], with_job: bool = True) -> list[list[str]]:
    """The arm of every run, by group."""
    runs = [read_run(make(job, with_job), job.arm) for job in jobs]
    return sorted([run.name for run in group.runs] for group in group_by_settings(runs))


def test_the_file_of_a_job_is_the_one_that_studies_write() -> None:
    assert records.JOB_FILE == JOB_FILE


def test_runs_on_classes_with_adapters_are_joined_by_arm(tmp_path: Path) -> None:
    arms = {
        name: {"options": {"classes": f"configs/classes/many_{name}.yaml", "lora": {"rank": 2}}}
        for name in ("even", "steep")
    }
    jobs = jobs_of(tmp_path, command="finetune_classes", metrics=["pictures right, all classes"], arms=arms)
    assert len({job.finetune_classes.lora.seed for job in jobs if isinstance(job, ClassesJob)}) == SEEDS
    assert groups_of(jobs, with_job=False) == [["even"] * SEEDS, ["steep"] * SEEDS]


def test_distillations_are_joined_by_arm_placebos_too(tmp_path: Path) -> None:
    formulas = ("relative", "permuted", "shuffled", "static")
    arms = {formula: {"options": {"david": {"fusion": {"formula": formula}}}} for formula in formulas}
    jobs = jobs_of(tmp_path, metrics=["velocity error"], arms=arms)
    assert groups_of(jobs, with_job=False) == [[formula] * SEEDS for formula in sorted(formulas)]


def test_arms_that_no_setting_tells_apart_are_not_joined(tmp_path: Path) -> None:
    arms = {"A": {}, "B": {"defects": ["noise_input"]}, "C": {"seed_offset": 100}}
    jobs = jobs_of(tmp_path, metrics=["velocity error"], arms=arms)
    assert groups_of(jobs) == [["A"] * SEEDS, ["B"] * SEEDS, ["C"] * SEEDS]


def test_a_placebos_permutations_are_no_seed_of_another_formula(tmp_path: Path) -> None:
    settings = {"train": {"seed": 0}, "david": {"fusion": {"formula": "relative", "placebo_seed": 0}}}
    runs = []
    for seed in (0, 1):
        run = make_run(tmp_path / str(seed))
        settings["david"]["fusion"]["placebo_seed"] = seed  # type: ignore[index]
        (run / "config.yaml").write_text(yaml.safe_dump({"distill": settings}))
        runs.append(read_run(run, run.name))
    assert len(group_by_settings(runs)) == 2


def test_a_job_file_of_another_program_is_no_arm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for content in ("[1]", "no JSON", "{}", "7"):
        (tmp_path / JOB_FILE).write_text(content)
        assert not any(read_run(run, "run").unlike_settings["arm"] or ())


def test_settings_of_any_shape_are_compared(tmp_path: Path) -> None:
    for number, settings in enumerate(({1: 2, "a": 3}, {"fast": "x"}, {"train": 3}, {"lora": "x", "david": [1]})):
        run = make_run(tmp_path / str(number))
        (run / "config.yaml").write_text(yaml.safe_dump({"distill": settings}))
        assert len(group_by_settings([read_run(run, "run")])) == 1


def test_the_page_shows_the_mean_of_class_runs(tmp_path: Path) -> None:
    runs: list[Path] = []
    for seed in range(SEEDS):
        run = make_run(tmp_path / f"seed{seed}" / "classes", seed=seed, classes=True)
        settings = {"train": {"max_samples": 640, "seed": seed}, "lora": {"rank": 2, "seed": seed}}
        (run / "config.yaml").write_text(yaml.safe_dump({"finetune_classes": settings}))
        runs.append(run)
    assert "seed0/classes and 2 more seeds (mean, 95 %)" in make_page(runs, None, None).text
