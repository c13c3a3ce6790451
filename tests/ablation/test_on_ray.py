"""Laws of studies on Ray: the figures of one process; lost tasks start again; nothing outlives the command."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from stages.ablation import command, on_ray, scheduler
from stages.ablation.jobs import Job
from stages.ablation.plan import make_plan
from stages.ablation.study import load_study
from stages.ablation.table import read_table
from stages.ablation.worker import run_job
from stages.cache.on_ray import connect
from stages.system.ownership import LAUNCH_VARIABLE, refuse_claimed
from stages.system.refusal import Refused

ray = pytest.importorskip("ray", reason="needs pip install 'sollune[ray]'")
GOLDEN = Path("tests/golden/data")
Write = Callable[..., Path]
SLEEPER = """
import time
from stages.system.ownership import process_token
print(process_token(), flush=True)
time.sleep(60)
"""


def words(file: Path, out: Path, *more: str) -> list[str]:
    return [str(file), "--run", str(GOLDEN), "--out", str(out), "--device", "cpu", *more]


def processes_of(folder: Path) -> list[int]:
    """Those whose command line names something in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], bool], seconds: float = 180) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_study_on_ray_is_interrupted_and_has_the_figures_of_one_process(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"A": {"title": "velocity alone", "options": {"objective": {"block_weight": 0.0}}}}
    file, out = write_study(arms=arms, comparisons=...), tmp_path / "out"
    ablate = [sys.executable, "-m", "stages", "ablate", *words(file, out, "--cluster", "ray", "--processes", "2")]
    first = subprocess.Popen(ablate, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert until(lambda: any(out.rglob("measured.json")))
    first.send_signal(signal.SIGTERM)
    printed, _ = first.communicate(timeout=120)
    assert first.returncode == 130, printed
    assert until(lambda: not processes_of(out), 20)

    done = subprocess.run(ablate, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 runs, 0 are done" not in done.stdout

    def in_this_process(jobs: Any, cache_run: Path, _at_once: int, on_finished: Any, start: object) -> None:
        assert start is None
        for job in jobs:
            scheduler.prepare(job, cache_run)
            run_job(job)
            on_finished(job)

    monkeypatch.setattr(scheduler, "run_jobs", in_this_process)
    assert command.main(words(file, tmp_path / "here")) == 0
    assert read_table(out / "ablation.parquet") == read_table(tmp_path / "here/ablation.parquet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this process."""
    connect(None)
    yield
    ray.shutdown()


def task_that_dies(times: int, exit_code: int = 0) -> Any:
    """Instead of a run: ends its Ray worker so many times, then returns the exit code."""

    def task(_folder: str, file: str) -> int:
        deaths = Path(file).with_suffix(".deaths")
        with deaths.open("a") as log:
            log.write("x")
        if deaths.stat().st_size <= times:
            os._exit(1)
        return exit_code

    return ray.remote(max_retries=0)(task)


@pytest.mark.parametrize(
    ("deaths", "code", "expected", "started"), [(0, 0, 0, 1), (1, 0, 0, 2), (0, 2, 2, 1), (3, 0, 0, 4), (9, 0, 1, 4)]
)
@pytest.mark.usefixtures("cluster")
def test_a_job_whose_node_is_lost_starts_again_at_most_three_times(
    write_study: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    deaths: int,
    code: int,
    expected: int,
    started: int,
) -> None:
    file = write_study()
    job: Job = make_plan(load_study(file), file, GOLDEN, tmp_path / "out", "cpu").jobs[0]
    scheduler.prepare(job, GOLDEN)
    running = on_ray.RayJob(ray, task_that_dies(deaths, code), job)
    assert until(lambda: running.poll() is not None)
    assert running.poll() == expected
    assert (job.home / "job.deaths").stat().st_size == started
    assert capsys.readouterr().err.count(job.label) == min(deaths, 4)


@pytest.mark.usefixtures("cluster")
def test_a_node_that_does_not_see_the_folders_says_so(write_study: Write, tmp_path: Path) -> None:
    file = write_study()
    job: Job = make_plan(load_study(file), file, GOLDEN, tmp_path / "out", "cpu").jobs[0]
    scheduler.prepare(job, GOLDEN)

    def elsewhere(_folder: str, file: str) -> int:
        return on_ray.run_on_node("/nowhere/at all", file)

    running = on_ray.RayJob(ray, ray.remote(max_retries=0)(elsewhere), job)
    assert until(lambda: running.poll() is not None)
    last = (job.home / "log.txt").read_text().splitlines()[-1]
    assert "/nowhere/at all: No such file or directory on " in last
    assert "all nodes have to see --run, --out" in last


def test_a_job_with_relative_paths_is_opened_from_the_folder_of_the_command(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, root = write_study(), Path.cwd()
    monkeypatch.chdir(tmp_path)
    jobs = make_plan(load_study(file), file, root / GOLDEN, Path("out"), "cpu").jobs
    scheduler.prepare(jobs[0], root / GOLDEN)
    folder = str(Path.cwd())
    monkeypatch.chdir("/")
    monkeypatch.setenv(LAUNCH_VARIABLE, "")
    assert on_ray.open_job(folder, str(jobs[0].home / "job.json")) == jobs[0]
    assert Path.cwd() == tmp_path


def test_the_claim_of_a_lost_node_of_this_study_is_void_and_of_another_one_is_not(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim of a process of another host, of which this one cannot see whether it runs."""
    file = write_study()
    job: Job = make_plan(load_study(file), file, GOLDEN, tmp_path / "out", "cpu").jobs[0]
    scheduler.prepare(job, GOLDEN)
    monkeypatch.setenv(LAUNCH_VARIABLE, "")
    on_ray.open_job(str(Path.cwd()), str(job.home / "job.json"))
    ours = os.environ[LAUNCH_VARIABLE]
    claim = {"owner": "elsewhere:1:2", "process": 1, "host": "elsewhere", "machine": "m", "boot": "b"}
    job.run_folder.mkdir()
    for run, refused in ((ours, False), (f"{ours}2", True), ("", True)):
        (job.run_folder / ".claim").write_text(json.dumps({**claim, "run": run}))
        with pytest.raises(Refused, match="cannot be seen from here") if refused else nullcontext():
            refuse_claimed(job.run_folder, "train in")


def test_a_process_that_still_writes_its_checkpoint_is_waited_for(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study()
    job: Job = make_plan(load_study(file), file, GOLDEN, tmp_path / "out", "cpu").jobs[0]
    with ExitStack() as writing:
        words = [sys.executable, "-c", SLEEPER]
        owner = writing.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        writing.callback(owner.kill)
        assert owner.stdout is not None
        job.run_folder.mkdir(parents=True)
        claim = {"owner": owner.stdout.readline().strip(), "process": owner.pid, "host": socket.gethostname()}
        (job.run_folder / ".claim").write_text(json.dumps(claim))
        looks: list[float] = []

        def look_again(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 3:
                owner.kill()
                owner.wait()

        monkeypatch.setattr(on_ray.time, "sleep", look_again)
        on_ray.wait_for_end(job)
    assert len(looks) == 3


@pytest.mark.usefixtures("cluster")
def test_a_job_that_does_not_end_is_killed(write_study: Write, tmp_path: Path) -> None:
    file = write_study()
    job: Job = make_plan(load_study(file), file, GOLDEN, tmp_path / "out", "cpu").jobs[0]
    scheduler.prepare(job, GOLDEN)

    def deaf(_folder: str, file: str) -> int:
        Path(file).with_suffix(".up").touch()
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                continue

    running = on_ray.RayJob(ray, ray.remote(max_retries=0)(deaf), job)
    assert until((job.home / "job.up").exists)
    running.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.5)
    assert running.poll() is None
    running.kill()
    assert running.wait(30) == on_ray.FAILED


@pytest.mark.parametrize("cluster", ["", "there", "ray:", "Ray", "ray auto", "here:1", "ray:127.0.0.1:1"])
def test_a_cluster_that_is_none_is_refused_before_anything_is_written(
    write_study: Write, tmp_path: Path, cluster: str
) -> None:
    with pytest.raises(Refused, match="cluster") as refusal:
        command.main(words(write_study(), tmp_path / "out", "--cluster", cluster))
    assert "\n" not in str(refusal.value)
    assert cluster in str(refusal.value)
    assert not list((tmp_path / "out").rglob("job.json"))
