"""Laws of a study's runs: what is planned, trained, measured and kept; a small study on the golden cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stages.ablation import command, scheduler
from stages.ablation.jobs import Job
from stages.ablation.measuring import Measured, read_rows
from stages.ablation.plan import make_plan
from stages.ablation.study import load_study
from stages.ablation.table import read_studies, read_table
from stages.ablation.worker import run_job
from stages.nets.run_folder import open_run
from stages.system.ownership import is_alive
from stages.system.refusal import Refused

GOLDEN = Path("tests/golden/data")
Write = Callable[..., Path]


def jobs_of(file: Path, out: Path) -> Sequence[Job]:
    return make_plan(load_study(file), file, GOLDEN, out, "cpu").jobs


def in_this_process(
    jobs: Sequence[Job], cache_run: Path, _at_once: int, on_finished: Callable[[Job], None], _start: object
) -> None:
    """The scheduler without processes."""
    for job in jobs:
        scheduler.prepare(job, cache_run)
        run_job(job)
        on_finished(job)


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Run the command on the golden cache in this process; returns the folder of the runs."""
    monkeypatch.setattr(scheduler, "run_jobs", in_this_process)

    def run(*words: str) -> Path:
        out = tmp_path / "out"
        assert command.main([*words, "--run", str(GOLDEN), "--out", str(out), "--device", "cpu"]) == 0
        return out

    return run


def test_arms_differ_in_their_options_alone_and_share_seeds(write_study: Write, tmp_path: Path) -> None:
    jobs = jobs_of(write_study(), tmp_path)
    assert [(job.arm, job.seed, job.distill.train.seed) for job in jobs] == [
        ("A", 0, 0), ("B", 0, 0), ("A", 1, 1), ("B", 1, 1),
    ]  # fmt: skip
    first, second = (job.distill.model_dump(exclude={"run", "objective", "david"}) for job in jobs[:2])
    assert first == second
    assert jobs[0].settings_hash() == jobs[2].settings_hash() != jobs[1].settings_hash()


def test_an_arm_of_another_order_differs_in_its_seed_alone(write_study: Write, tmp_path: Path) -> None:
    arms = {"A": {"title": "a"}, "A2": {"title": "again", "seed_offset": 50}}
    jobs = jobs_of(write_study(arms=arms, comparisons=...), tmp_path)
    assert [job.distill.train.seed for job in jobs] == [0, 50, 1, 51]
    assert len({job.settings_hash() for job in jobs}) == 1


def test_the_arm_overrides_the_regime_and_the_regime_the_study(write_study: Write, tmp_path: Path) -> None:
    regimes = {"r": {"title": "r", "options": {"objective": {"block_weight": 0.3, "uncond_weight": 0.5}}}}
    file = write_study(regimes=regimes, options={"objective": {"block_weight": 0.1, "guidance_weight": 0.7}})
    objective = jobs_of(file, tmp_path)[0].distill.objective
    assert (objective.block_weight, objective.uncond_weight, objective.guidance_weight) == (0.0, 0.5, 0.7)


def test_a_study_is_run_measured_and_kept(write_study: Write, ablate: Callable[..., Path], tmp_path: Path) -> None:
    arms = {
        "A": {"title": "velocity alone", "options": {"objective": {"block_weight": 0.0}}},
        "noise": {"title": "noise", "defects": ["noise_input", "default_schedule"]},
        "flow": {"title": "the teacher as a flow", "model": "teacher"},
        "name": {"title": "the teacher's name", "model": "teacher_as_student"},
    }
    file = write_study(arms=arms, comparisons=[{"arms": ["noise", "flow", "name"], "against": ["A"]}])
    out = ablate(str(file))
    rows = read_table(out / "ablation.parquet")

    # Every figure of every run, and the curves of those that were trained
    assert {(row.arm, row.seed) for row in rows} == {(arm, seed) for arm in arms for seed in (0, 1)}
    curve = [row.samples for row in rows if (row.arm, row.seed, row.metric) == ("A", 0, "validation velocity error")]
    assert curve == [4, 8]
    of_flow = {row.metric for row in rows if row.arm == "flow"}
    assert of_flow == {"paired error at 1 steps", "paired error at 2 steps"}
    assert {row.samples for row in rows if row.arm in ("flow", "name")} == {0}

    # The teacher sampled as a flow is its own floor; as a student it is not
    evaluation = json.loads((out / "small/only/A/seed0/distill/evaluation.json").read_text())
    floor = evaluation["paired"]["student"][1]["floor"]
    at_two = {row.arm: row.value for row in rows if row.metric == "paired error at 2 steps" and row.seed == 0}
    assert at_two["flow"] == pytest.approx(floor, abs=1e-6)
    assert at_two["name"] > at_two["flow"]

    # An ordinary run folder
    saved = open_run(out / "small/only/A/seed0/distill")
    assert saved.samples == 8
    identity = json.loads((out / "small/only/noise/seed0/distill/checkpoints/000000008/state.json").read_text())
    assert "noise_input + default_schedule" in json.dumps(identity)

    # The second time there is nothing to do, and what a run lost is made again alone
    before = (out / "ablation.parquet").read_bytes()
    weights = saved.weights.stat().st_mtime_ns
    lost = out / "small/only/A/seed1"
    shutil.rmtree(lost)
    ablate(str(file))
    assert lost.is_dir()
    assert saved.weights.stat().st_mtime_ns == weights
    assert read_table(out / "ablation.parquet") == rows
    assert before == (out / "ablation.parquet").read_bytes()
    assert list(read_studies(out / "ablation.parquet")) == ["small"]
    assert (out / "ablation.md").read_text().startswith("# Ablation")


def test_a_run_with_other_settings_is_not_taken_for_this_one(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(write_study(), tmp_path)
    scheduler.prepare(jobs[0], GOLDEN)
    jobs[0].refuse_other_run()
    other = jobs_of(write_study(samples=12), tmp_path)[0]
    with pytest.raises(Refused, match=r"distill\.train\.max_samples was 8, is 12.* - choose another --out"):
        other.refuse_other_run()


def test_another_measurement_keeps_the_run(write_study: Write, tmp_path: Path) -> None:
    job = jobs_of(write_study(), tmp_path)[0]
    job.home.mkdir(parents=True)
    content = {"settings": job.settings_hash(), "weights": "w", "samples": 8, "figures": {"velocity error": 0.5}}
    (job.home / "measured.json").write_text(json.dumps(content))
    assert Measured.read(job) is not None
    rows = read_rows(job)
    assert rows is not None
    assert rows[0].value == 0.5
    evaluate = {"velocity_states": 4, "paired": {"prompts": 2, "steps": [1, 2], "reference_steps": 2}}
    other = jobs_of(write_study(evaluate=evaluate), tmp_path)[0]
    other.refuse_other_run()
    assert Measured.read(other) is None


WORKER = """
import json, sys, time
from pathlib import Path
from stages.system.ownership import process_token
job = Path(sys.argv[1])
content = json.loads(job.read_text())
label = f"{content['arm']}{content['seed']}"
folder = Path(__file__).parent
(folder / f"{label}-{process_token()}.up").touch()
while not (folder / f"go-{label}").exists():
    time.sleep(0.02)
if (folder / f"go-{label}").read_text():
    sys.exit("sollune: it cannot be - do otherwise")
(job.parent / "measured.json").touch()
"""
LAUNCHER = """
import sys
from pathlib import Path
from stages.ablation import command, scheduler
from stages.ablation.plan import make_plan
from stages.ablation.study import load_study
file, out = Path(sys.argv[1]), Path(sys.argv[2])
jobs = make_plan(load_study(file), file, Path("tests/golden/data"), out, "cpu").jobs
scheduler.WORKER = "stub_worker"
missing = [job for job in jobs if not (job.home / "measured.json").exists()]
try:
    scheduler.run_jobs(missing, Path("tests/golden/data"), 2, lambda job: print(job.label, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def launch(file: Path, folder: Path) -> "subprocess.Popen[str]":
    """The scheduler in a process, with a worker that waits for a file."""
    (folder / "stub_worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(folder)])}
    words = [sys.executable, "-c", LAUNCHER, str(file), str(folder / "out")]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_command_and_only_what_is_missing_runs_again(
    write_study: Write, tmp_path: Path, number: signal.Signals
) -> None:
    file = write_study()
    (tmp_path / "go-A0").touch()
    launcher = launch(file, tmp_path)
    assert until(lambda: len(list(tmp_path.glob("*.up"))) == 3)  # A0 is done; B0 and A1 run
    workers = [path.stem.partition("-")[2] for path in tmp_path.glob("*.up")]
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    assert until(lambda: not any(is_alive(worker) for worker in workers), 10)
    for path in tmp_path.glob("*.up"):
        path.unlink()
    for label in ("B0", "A1", "B1"):
        (tmp_path / f"go-{label}").touch()
    printed, _ = launch(file, tmp_path).communicate(timeout=120)
    assert sorted(path.name.partition("-")[0] for path in tmp_path.glob("*.up")) == ["A1", "B0", "B1"]
    assert "0 of 3 runs left" in printed


def test_a_run_that_fails_does_not_keep_others_from_running(write_study: Write, tmp_path: Path) -> None:
    for label in ("B0", "A1", "B1"):
        (tmp_path / f"go-{label}").touch()
    (tmp_path / "go-A0").write_text("fail")
    launcher = launch(write_study(), tmp_path)
    printed, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 1  # the exception that names it
    assert "small/only/A seed 0: it cannot be - do otherwise" in errors
    assert printed.count("done in") == 3
