"""Laws of workers on other machines: a lost one is replaced, and a drained one gives its shard back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.killing import fork_job, wait_for_exit
from configs.values import PictureSize
from shards.record import Record
from shards.writer import CacheWriter
from stages.cache import fleet, on_ray
from stages.cache.claims import marked
from stages.cache.fill import FillJob, RecordMaker, fill, tasks_of
from stages.cache.fleet import MAX_LOSSES, Worker, fill_by_many
from stages.cache.sizes import RenderSizes
from stages.prompts import Prompt
from stages.system.refusal import Refused
from tests.cache.test_workers import RECIPE, SIZE, content, make

Ending = Callable[[FillJob], BaseException | None]


class Lost(Exception):
    """A worker's machine is gone."""


def job_in(cache: Path, maker: RecordMaker = make) -> FillJob:
    """Ten shards of four prompts."""
    tasks = tasks_of({"train": [Prompt(f"star {i}", "star", i) for i in range(40)]}, 4, 2, RenderSizes(SIZE))
    return FillJob(lambda _: (CacheWriter(cache, RECIPE), maker), tasks)


def started(endings: list[Ending], job: FillJob, name: str = "worker") -> Worker:
    """A worker that has ended already, by the next of these endings; the one after it takes the place of a lost one."""
    result: Future[int] = Future()
    error = endings.pop(0)(job)
    result.set_exception(error) if error else result.set_result(0)
    return Worker(
        name,
        result,
        lambda _: None,
        str,
        lambda error: started(endings, job, name) if isinstance(error, Lost) else None,
    )


def filled(cache: Path, endings: list[Ending]) -> int:
    writer, job = CacheWriter(cache, RECIPE), job_in(cache)
    return fill_by_many(writer, job, {SIZE: 1000}, lambda job: [started(endings, job)])


def lost_after(shards: int, error: BaseException | None = None) -> Ending:
    """A worker that makes some shards and is lost in the next."""

    def end(job: FillJob) -> BaseException:
        writer, maker = job.open_worker(0)
        missing = [task for task in job.tasks if not writer.is_finished(*task.shard)]
        fill(writer, missing[:shards], maker, show_progress=False)
        return error or Lost("its machine is gone")

    return end


def finishing(job: FillJob) -> None:
    job.run(0)


def test_a_lost_worker_is_started_again_as_long_as_shards_are_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = [*[lost_after(1)] * 5, *[lost_after(0)] * (MAX_LOSSES - 1), lost_after(2), finishing]
    assert filled(tmp_path / "lost", endings) == 10
    assert filled(tmp_path / "whole", [finishing]) == 10
    assert content(tmp_path / "lost") == content(tmp_path / "whole")
    assert "its machine is gone" in capsys.readouterr().err


def test_a_worker_that_is_lost_each_time_before_a_shard_is_not_started_for_ever(tmp_path: Path) -> None:
    endings = [lost_after(1), *[lost_after(0)] * 20]
    with pytest.raises(Refused, match="worker: its machine is gone - what is finished is kept"):
        filled(tmp_path, endings)
    assert len(endings) == 20 - MAX_LOSSES
    assert filled(tmp_path, [finishing]) == 9


def test_a_worker_that_failed_is_not_started_again(tmp_path: Path) -> None:
    endings = [lost_after(1, ZeroDivisionError("by zero")), finishing]
    with pytest.raises(Refused, match="worker: by zero"):
        filled(tmp_path, endings)
    assert endings == [finishing]


def test_a_worker_that_has_no_place_is_not_waited_for_when_all_shards_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(fleet, "GLANCE_SECONDS", 0.01)
    stopped = []
    waiting = Worker("worker 2", Future(), stopped.append, str)
    job = job_in(tmp_path)
    made = fill_by_many(
        CacheWriter(tmp_path, RECIPE), job, {SIZE: 1000}, lambda job: [started([finishing], job), waiting]
    )
    assert (made, stopped) == (10, [False, True])


def test_a_worker_in_another_folder_of_that_path_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with marked(tmp_path / "there") as mark:
        assert mark.exists()
        elsewhere = replace(job_in(tmp_path / "here"), mark=tmp_path / "here" / mark.relative_to(tmp_path / "there"))
        with pytest.raises(Refused, match=r"here.* is another folder on .* - put the run folder on a disk that all"):
            elsewhere.run(0)
        replace(job_in(tmp_path / "there"), mark=mark).run(0)
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "there" / ".claims").exists()


def test_a_worker_that_is_drained_gives_its_shard_back_and_ends(tmp_path: Path) -> None:
    def slow(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if keys[0] == "000000014":
            (tmp_path / "begun").touch()
            time.sleep(60)
        return make(prompts, keys, size)

    pid = fork_job(partial(on_ray.run_worker, job_in(tmp_path / "cache", slow)))  # type: ignore[arg-type]
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert wait_for_exit(pid) == 128 + signal.SIGTERM
    assert not list((tmp_path / "cache").rglob(".*"))
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 3


def test_a_cluster_that_loses_a_node_ends_on_the_same_bytes_and_does_nothing_twice_but_what_was_lost() -> None:
    pytest.importorskip("ray", reason="needs pip install 'sollune[ray]'")
    words = [sys.executable, "-m", "benchmarks.nodes", "--forged", "--count", "40", "--seeds", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert (cells[0], cells[2], cells[7], cells[8]) == ("kill", "42", "0", "True")


@pytest.mark.parametrize("port", ["1", "70000"])
def test_an_address_at_which_nothing_answers_is_refused_at_once(port: str) -> None:
    with pytest.raises(Refused, match=rf"cluster = ray:127\.0\.0\.1:{port}: nothing answers there .* - name a running"):
        on_ray.refuse_silent(f"127.0.0.1:{port}")
    on_ray.refuse_silent("auto")
