"""Laws of what a study reads: a run of another cache, of other prompts or of another student is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.manifest import Manifest
from stages.ablation import command, scheduler
from stages.ablation.inputs import jobs_of, refuse_unlike_plans, with_inputs
from stages.ablation.jobs import read_job
from stages.ablation.measuring import Measured
from stages.ablation.plan import Plan, make_plan
from stages.ablation.quick import shortened
from stages.ablation.study import load_study
from stages.system.refusal import Refused

GOLDEN = Path("tests/golden/data")
Write = Callable[..., Path]


def plan_of(file: Path, out: Path, run: Path = GOLDEN) -> Plan:
    return make_plan(load_study(file), file, run, out, "cpu")


def another_cache(folder: Path) -> Path:
    """A run folder whose cache has another recipe."""
    shutil.copytree(GOLDEN / "cache", folder / "cache")
    manifest = Manifest.open(folder / "cache")
    identity = {**manifest.recipe.identity, "dtype": "float16"}
    manifest.model_copy(update={"recipe": manifest.recipe.model_copy(update={"identity": identity})}).save(
        folder / "cache"
    )
    return folder


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_of_another_cache_is_refused(write_study: Write, tmp_path: Path, is_finished: bool) -> None:
    plan = plan_of(write_study(), tmp_path / "out")
    job = jobs_of([plan], GOLDEN)[0]
    scheduler.prepare(job, GOLDEN)
    if is_finished:
        (job.home / "measured.json").touch()
    assert read_job(job.home / "job.json") == job
    jobs_of([plan], GOLDEN)
    with pytest.raises(
        Refused, match=r"A/seed0: holds a run with another cache \(\w{12}, now \w{12}\) - choose"
    ) as one:
        jobs_of([plan], another_cache(tmp_path / "other"))
    assert "\n" not in str(one.value)


def test_a_job_of_before_is_known_by_the_origin_of_its_student(write_study: Write, tmp_path: Path) -> None:
    plan = plan_of(write_study(), tmp_path / "out")
    job = plan.jobs[0]
    assert not job.inputs
    scheduler.prepare(job, GOLDEN)
    jobs_of([plan], GOLDEN)  # nothing is known of it
    job.run_folder.mkdir()
    origin = json.loads((GOLDEN / "distill/origin.json").read_text())
    (job.run_folder / "origin.json").write_text(json.dumps(origin))
    jobs_of([plan], GOLDEN)
    (job.run_folder / "origin.json").write_text(json.dumps({**origin, "recipe_sha256": "0" * 64}))
    with pytest.raises(Refused, match="another cache"):
        jobs_of([plan], GOLDEN)


def test_another_list_of_prompts_means_another_measurement_of_the_same_run(write_study: Write, tmp_path: Path) -> None:
    """The file of prompts keeps its name, and gets another line."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue circle\na green heart\n")
    source = {"source": "file", "path": str(prompts)}
    file = write_study(evaluate={"prompts": source}, metrics=["velocity error"])
    job = jobs_of([plan_of(file, tmp_path / "out")], GOLDEN)[0]
    scheduler.prepare(job, GOLDEN)
    measured = Measured(job.settings_hash(), "w", 8, {"velocity error": 0.5}, job.prompts)
    (job.home / "measured.json").write_text(json.dumps(vars(measured)))
    assert Measured.read(job) == measured
    prompts.write_text("a red star\na blue circle\na green cross\n")
    again = jobs_of([plan_of(file, tmp_path / "out")], GOLDEN)[0]
    assert again.settings_hash() == job.settings_hash()
    assert Measured.read(again) is None
    of_before = {key: value for key, value in vars(measured).items() if key != "prompts"}
    (job.home / "measured.json").write_text(json.dumps(of_before))
    assert Measured.read(again) is not None


def test_a_cache_of_another_world_is_refused_before_anything_is_written(write_study: Write, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten seven\na handwritten three\n")
    settings = {"cache_teacher": {"prompts": {"source": "file", "path": str(prompts)}}}
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(settings))
    file = write_study()
    file.write_text(file.read_text().replace("files:", f"files:\n- {other}", 1))
    content = load_study(file)
    study = content.model_copy(update={"files": (*content.files[1:], content.files[0])})
    with pytest.raises(
        Refused, match=r"cache: holds other prompts \(\w{12}\) than small names \(\w{12}\) - give a --run"
    ):
        with_inputs(make_plan(study, file, GOLDEN, tmp_path / "out", "cpu"), GOLDEN)
    assert not (tmp_path / "out").exists()


def test_studies_that_would_make_different_caches_are_refused_together(write_study: Write, tmp_path: Path) -> None:
    one = plan_of(write_study("one"), tmp_path, tmp_path / "run")
    two = plan_of(write_study("two"), tmp_path, tmp_path / "run")
    refuse_unlike_plans([one, two], False, False)
    digits = Path("configs/ablation/digits.yaml")
    three = plan_of(digits, tmp_path, tmp_path / "run")
    with pytest.raises(Refused, match="one and digits: the settings of their caches differ"):
        refuse_unlike_plans([one, two, three], False, True)
    refuse_unlike_plans([one, two, three], True, True)  # one cache is there, and each is compared with it


@pytest.mark.parametrize("quick", [False, True])
def test_the_studies_that_run_by_default_share_one_cache_and_one_student(tmp_path: Path, quick: bool) -> None:
    files = command.QUICK_STUDIES if quick else command.DEFAULT_STUDIES
    studies = {file: shortened(load_study(file)) if quick else load_study(file) for file in files}
    plans = [make_plan(study, file, tmp_path / "run", tmp_path / "out", "cpu") for file, study in studies.items()]
    refuse_unlike_plans(plans, False, False)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"metrics": ["paired error at 12 steps"]}, "paired error at 12 steps"),
        ({"metrics": ["velocity error", "pictures right at 2 steps"]}, "pictures right at 2 steps"),
        ({"metrics": ["paired error at 2 steps"], "guidance": [1, 3]}, "paired error at 2 steps"),
        ({"metrics": ["paired error at 2 steps, guidance 3"]}, "paired error at 2 steps, guidance 3"),
        ({"metrics": ["guidance error, s 0.0 to 0.2"]}, "guidance error, s 0.0 to 0.2"),
        ({"metrics": ["velocity error, s 0.1 to 0.9"]}, "velocity error, s 0.1 to 0.9"),
        (
            {"comparisons": [{"arms": ["B"], "against": ["A"], "metrics": ["paired error at 3 steps"]}]},
            "paired error at 3 steps",
        ),
    ],
)
def test_a_figure_that_is_not_measured_is_refused(
    write_study: Write, tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    file = write_study(**changes)
    with pytest.raises(Refused, match="is not measured with these settings") as refusal:
        plan_of(file, tmp_path / "out")
    assert f"metrics: {name}: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["velocity error, s 0.8 to 1.0", "cache gap", "guidance error", "paired error at 1 steps"]
)
def test_a_figure_that_is_measured_is_taken(write_study: Write, tmp_path: Path, name: str) -> None:
    assert plan_of(write_study(metrics=[name]), tmp_path / "out").jobs


def test_a_quick_study_without_an_arm_of_a_comparison_leaves_that_out(write_study: Write) -> None:
    study = {
        "regimes": {"grafted": {"title": "g"}, "pruned": {"title": "p", "options": {"student": {"prune": "tiny"}}}},
        "arms": {"A": {"title": "a"}, "H": {"title": "h", "regimes": ["grafted"]}, "C": {"title": "c"}},
        "comparisons": [{"arms": ["H", "C"], "against": ["A"]}, {"arms": ["H"], "against": ["C"]}],
    }
    quick = {"arms": ["A", "C", "H"], "regimes": ["pruned"], "samples": 4}
    short = shortened(load_study(write_study(**study, quick=quick)))
    assert [(one.arms, one.against) for one in short.comparisons] == [(("C",), ("A",))]
    only_h = {**quick, "arms": ["H"]}
    with pytest.raises(Refused, match="small") as refusal:
        shortened(load_study(write_study(**study, quick=only_h)))
    assert "\n" not in str(refusal.value)
