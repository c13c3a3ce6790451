"""Laws of studies of finetune-classes: from the distilled student, on shared pictures, measured by the exam."""

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import load
from shards.manifest import Manifest
from stages import distill
from stages.ablation import command, scheduler
from stages.ablation.classes_run import exam_figures
from stages.ablation.inputs import jobs_of as with_jobs
from stages.ablation.jobs import ClassesJob, Job, read_job
from stages.ablation.plan import make_plan
from stages.ablation.study import Study, load_study
from stages.ablation.table import read_table
from stages.ablation.worker import run_job
from stages.classes.specification import load_classes
from stages.nets.run_folder import open_run
from stages.system.disk import file_sha256
from stages.system.refusal import Refused

GOLDEN = Path("tests/golden/data")
CLASSES = "classes: [{name: stars, pattern: star/*, priority: top}, {name: rest, pattern: '[!s]*', priority: low}]\n"


@pytest.fixture(scope="module")
def write_study(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a small study, with other entries if any; returns its file."""
    folder = tmp_path_factory.mktemp("study")
    for name, weights in (("even", "{top: 1, low: 1}"), ("steep", "{top: 3, low: 1}")):
        (folder / f"{name}.yaml").write_text(f"weights: {weights}\n{CLASSES}")
    prompts = {"source": "grammar", "grammar": "stages/tiny/grammar.yaml"}
    (folder / "settings.yaml").write_text(
        yaml.safe_dump(
            {
                "cache_teacher": {"teacher": str(GOLDEN / "teacher"), "prompts": prompts, "count": 8},
                "distill": {"train": {"max_samples": 8}},
                "finetune_classes": {"prompts": prompts, "count": 4, "scorer": "stages.tiny.score.score"},
            }
        )
    )

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "name": "small",
            "title": "Do priorities pay?",
            "command": "finetune_classes",
            "files": [str(folder / "settings.yaml")],
            "options": {
                "lora": {"rank": 2},
                "render": {
                    "states": {"steps": 4, "trajectory_states": 2, "renoised_states": 1},
                    "records_per_shard": 4,
                },
                "gate": {"score": 0.0},
                "pictures": {"reuse": 0.0},
                "exam": {"pictures": 2, "checkpoint_pictures": 1, "sampler": {"steps": 1}},
                "train": {
                    "batch_size": 4,
                    "optimizer": {"warmup_samples": 0},
                    "tracking": {"to": []},
                    "checkpoint_every_samples": 8,
                },
            },
            "samples": 8,
            "seeds": 2,
            "metrics": ["paired error, top classes", "pictures right, all classes"],
            "arms": {
                name: {"title": name, "options": {"classes": str(folder / f"{name}.yaml")}}
                for name in ("even", "steep")
            },
            "comparisons": [{"arms": ["steep"], "against": ["even"]}],
            **changes,
        }
        file = folder / "study.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def jobs_of(file: Path, out: Path) -> list[ClassesJob]:
    jobs = make_plan(load_study(file), file, GOLDEN, out, "cpu").jobs
    assert all(isinstance(job, ClassesJob) for job in jobs)
    return [job for job in jobs if isinstance(job, ClassesJob)]


def test_runs_of_a_seed_share_its_order_and_its_adapters(write_study: Callable[..., Path], tmp_path: Path) -> None:
    jobs = jobs_of(write_study(), tmp_path)
    seeds = [(job.arm, job.finetune_classes.train.seed, job.finetune_classes.lora) for job in jobs]
    assert [(arm, seed, lora and lora.seed) for arm, seed, lora in seeds] == [
        ("even", 0, 0), ("steep", 0, 0), ("even", 1, 1), ("steep", 1, 1),
    ]  # fmt: skip
    assert jobs[0].settings_hash() == jobs[2].settings_hash() != jobs[1].settings_hash()


def test_a_class_file_that_changed_is_another_run(write_study: Callable[..., Path], tmp_path: Path) -> None:
    file = write_study()
    first = jobs_of(file, tmp_path)[0]
    scheduler.prepare(first, GOLDEN)
    assert read_job(first.home / "job.json") == first
    assert (first.home / "distill").resolve() == (GOLDEN / "distill").resolve()
    jobs_of(file, tmp_path)[0].refuse_other_run()
    classes = first.finetune_classes.classes
    before = classes.read_text()
    classes.write_text(before.replace("top: 1", "top: 2"))
    try:
        with pytest.raises(Refused, match=r"other settings \(class_file was .* - choose another --out"):
            jobs_of(file, tmp_path)[0].refuse_other_run()
    finally:
        classes.write_text(before)


def test_a_study_of_classes_is_trained_examined_and_kept(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def in_this_process(jobs, cache_run, _processes, on_finished, _start):  # type: ignore[no-untyped-def]
        for job in jobs:
            scheduler.prepare(job, cache_run)
            run_job(read_job(job.home / "job.json"))
            made.append(job.label)
            on_finished(job)

    monkeypatch.setattr(scheduler, "run_jobs", in_this_process)
    options = {"train": {"optimizer": {"learning_rate": 1e-2}}, "lora": None}
    regimes = {"only": {"title": "as it is", "options": options}}
    arms = {"even": load_study(write_study()).arms["even"].model_dump(mode="json")}
    file, out = write_study(arms=arms, comparisons=[], regimes=regimes), tmp_path / "out"
    words = [str(file), "--run", str(GOLDEN), "--out", str(out), "--device", "cpu"]
    assert command.main(words) == 0

    # Every figure before and after, the same before in all runs
    rows = read_table(out / "ablation.parquet")
    assert {(row.arm, row.seed) for row in rows} == {("even", 0), ("even", 1)}
    assert {row.metric for row in rows} >= {"paired error, top classes", "pictures right, low classes, before"}
    assert not any("mid classes" in row.metric for row in rows)
    assert len({row.value for row in rows if row.metric == "paired error, all classes, before"}) == 1
    assert len({row.value for row in rows if row.metric == "paired error, top classes"}) == 2
    assert len({row.weights for row in rows}) == 2
    assert {row.samples for row in rows} == {8}
    assert "### Learning curves" not in (page := (out / "ablation.md").read_text())
    assert "samples to" not in page

    # Ordinary runs of classes, whose pictures were drawn once
    home = out / "small" / "only" / "even" / "seed0"
    assert open_run(home / "classes").samples == 8
    (pictures,) = (out / "references").glob("classes-*/classes/cache")
    assert {(home.parent / f"seed{seed}" / "classes" / "cache").resolve() for seed in (0, 1)} == {pictures.resolve()}

    # What is there is not made again; lost figures are those of the finished training
    weights = open_run(home / "classes").weights.stat().st_mtime_ns
    (home / "measured.json").unlink()
    made.clear()
    assert command.main(words) == 0
    assert made == ["small/only/even seed 0"]
    assert read_table(out / "ablation.parquet") == rows
    assert open_run(home / "classes").weights.stat().st_mtime_ns == weights


def test_the_student_to_start_from_is_distilled_where_it_is_missing(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "cache").symlink_to((GOLDEN / "cache").resolve())
    calls: list[object] = []

    def make(config: object) -> None:
        calls.append(config)
        shutil.copytree(GOLDEN / "distill", run / "distill")

    monkeypatch.setattr(distill, "run", make)
    monkeypatch.setattr(scheduler, "run_jobs", lambda jobs, *_: calls.append(jobs[0].inputs))
    file = write_study()
    assert command.main([str(file), "--run", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    expected = load(distill.Config, "distill", load_study(file).files, ["--run", str(run), "--device", "cpu"])
    weights = file_sha256(open_run(GOLDEN / "distill").weights)
    recipe = Manifest.open(GOLDEN / "cache").recipe.fingerprint()
    assert calls == [expected, {"cache": recipe, "distilled student": weights}]


def test_runs_from_another_student_are_refused(write_study: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOLDEN, run)
    job = inputs_of_run(write_study(), run, tmp_path / "out")[0]
    scheduler.prepare(job, run)
    inputs_of_run(write_study(), run, tmp_path / "out")
    weights = open_run(run / "distill").weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Refused, match="holds a run with another distilled student"):
        inputs_of_run(write_study(), run, tmp_path / "out")


def inputs_of_run(file: Path, run: Path, out: Path) -> Sequence[Job]:
    return with_jobs([make_plan(load_study(file), file, run, out, "cpu")], run)


def test_figures_are_means_over_the_classes_of_a_priority(tmp_path: Path) -> None:
    file = tmp_path / "per_class.csv"
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["class", "priority", "paired_error_before", "paired_error_after", "all_before", "all_after"])
        writer.writerow(["a", "top", 0.1, 0.2, 0.5, 0.6])
        writer.writerow(["b", "top", 0.3, 0.4, 0.7, 1.0])
        writer.writerow(["c", "low", 0.5, 0.9, 0.0, 0.2])
        writer.writerow(["(outside)", "", 1.0, 2.0, 0.9, 0.8])
    figures = exam_figures(file)
    assert figures["pictures right, top classes"] == pytest.approx(0.8)
    assert figures["pictures right, all classes"] == pytest.approx(0.6)
    assert figures["pictures right, all classes, before"] == pytest.approx(0.4)
    assert figures["paired error, low classes"] == pytest.approx(0.9)
    assert figures["pictures right, outside"] == pytest.approx(0.8)
    assert "pictures right, mid classes" not in figures
    file.write_text("class,priority,all_after\na,top,much\n")
    with pytest.raises(Refused, match=r"per_class\.csv: is no table of classes .* - remove"):
        exam_figures(file)


def test_the_class_files_of_the_study_differ_in_their_weights_alone() -> None:
    many, even, steep = (load_classes(Path("configs/classes", f"many{name}.yaml")) for name in ("", "_even", "_steep"))
    assert many.classes == even.classes == steep.classes
    assert len(set(even.weights.values())) == 1
    assert {spec.priority for spec in many.classes} == {"top", "mid", "low"}
    top = many.classes[0]
    assert many.sampling_share(top) == pytest.approx(2 * even.sampling_share(top))
    assert steep.sampling_share(top) == pytest.approx(3 * even.sampling_share(top))


def test_a_study_without_a_command_is_one_of_distill() -> None:
    content = {"name": "s", "title": "?", "files": ["configs/tiny.yaml"], "regimes": {"r": {"title": "r"}},
               "arms": {"A": {"title": "a"}}, "metrics": ["velocity error"]}  # fmt: skip
    assert Study.model_validate(content).command == "distill"
