"""Laws of several workers: the same bytes as one, and none of them is missed, waited for in vain, or left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from configs.load import load
from configs.values import PictureSize
from shards.manifest import Manifest, Recipe
from shards.record import BlockFeatures, Record, States
from shards.writer import CacheWriter
from stages import cache_teacher
from stages.cache import local
from stages.cache.fill import FillJob, RecordMaker, tasks_of
from stages.cache.fleet import fill_by_many
from stages.cache.sizes import RenderSizes
from stages.prompts import Prompt
from stages.system.ownership import is_alive, process_token
from stages.system.refusal import Refused
from tests.cache_checks import open_verified

SIZE = PictureSize(40, 32)
RECIPE = Recipe(identity={"steps": 2})
COUNT = 40
FEW = ["--count", "5", "--validation-count", "2", "--render.records-per-shard", "2", "--render.states.steps", "4"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SIZE = PictureSize(40, 32)


def make(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
    """Records of a teacher that costs nothing."""

    def one(prompt: Prompt, key: str) -> Record:
        half = torch.full((2, 3, 4, 5), float(prompt.seed)).half()
        states = States(torch.arange(2), torch.ones(2), half, half, half, torch.tensor([True, False]))
        features = BlockFeatures({"mid": half.mean(dim=(2, 3))})
        return Record(
            key, prompt.text, prompt.class_name, prompt.seed, 5.0, half[0, 0], half[0], states, features, SIZE
        )

    return [one(prompt, key) for prompt, key in zip(prompts, keys, strict=True)]


MAKER: list[RecordMaker] = [make]
"""The `make` of a forked worker, with the values of this module at the time of the fork."""


def opened(folder: Path, number: int) -> tuple[CacheWriter, RecordMaker]:
    return CacheWriter(folder, RECIPE), MAKER[0]


def filled(folder: Path, workers: int, maker: RecordMaker = make) -> Path:
    MAKER[0] = maker
    tasks = tasks_of({"train": [Prompt(f"star {i}", "star", i) for i in range(COUNT)]}, 4, 2, RenderSizes(SIZE))
    job = FillJob(partial(opened, folder), tasks)
    fill_by_many(
        CacheWriter(folder, RECIPE), job, {SIZE: 1000}, partial(local.start_workers, count=workers, method="fork")
    )
    return folder


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_bytes_of_one(tmp_path: Path, workers: int) -> None:
    assert content(filled(tmp_path / "many", workers)) == content(filled(tmp_path / "one", 1))
    assert len(open_verified(tmp_path / "many").shards) == 10


def test_a_worker_that_is_killed_is_reported_and_its_shard_is_made_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed_once(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        time.sleep(0.02)
        if keys[0] == "000000010":
            try:
                (tmp_path / "killed").touch(exist_ok=False)
            except FileExistsError:
                return make(prompts, keys, size)
            os.kill(os.getpid(), signal.SIGKILL)
        return make(prompts, keys, size)

    assert content(filled(tmp_path / "many", 2, killed_once)) == content(filled(tmp_path / "one", 1))
    printed = capsys.readouterr().err
    assert "worker " in printed
    assert "was killed (SIGKILL" in printed


def test_an_error_of_every_worker_is_reported_with_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if int(keys[0]) >= 36:
            raise ZeroDivisionError("by zero")
        return make(prompts, keys, size)

    with pytest.raises(
        Refused, match=r"worker . .*: ZeroDivisionError: by zero; worker . .*: ZeroDivisionError: by zero - "
    ):
        filled(tmp_path, 2, broken)
    assert "in broken" in capsys.readouterr().err
    assert len(open_verified(tmp_path).shards) == 9


def test_an_interruption_ends_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        (tmp_path / "begun").touch()
        time.sleep(60)
        return []

    def ctrl_c(*_: object) -> int:
        if (tmp_path / "begun").exists():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr("stages.cache.fleet.prompts_made", ctrl_c)
    monkeypatch.setattr("stages.cache.fleet.GLANCE_SECONDS", 0.05)
    before = {*multiprocessing.active_children()}
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", 2, endless)
    deadline = time.monotonic() + 30
    while (left := {*multiprocessing.active_children()} - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert content(tmp_path / "cache") == {}


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    def endless(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        (tmp_path / f"{process_token()}.worker").touch()
        time.sleep(60)
        return []

    parent = multiprocessing.get_context("fork").Process(target=filled, args=(tmp_path / "cache", 2, endless))
    parent.start()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("*.worker"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    workers = [path.stem for path in tmp_path.glob("*.worker")]
    assert len(workers) == 2
    while any(is_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(worker) for worker in workers)


def config(run: Path, *options: str) -> cache_teacher.Config:
    return load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], ["--run", str(run), *FEW, *options])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the embedded teacher, made in this process."""
    run = tmp_path_factory.mktemp("alone")
    cache_teacher.run(config(run))
    return run / "cache"


def test_two_workers_with_the_real_teacher_give_the_bytes_of_one(alone: Path, tmp_path: Path) -> None:
    cache_teacher.run(config(tmp_path, "--workers", "2"))
    assert content(tmp_path / "cache") == content(alone)


def test_two_ranges_give_the_bytes_of_one_and_the_first_prints_what_is_missing(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_teacher.run(config(tmp_path, "--shard-range", "1:3"))
    assert "2 shards made, 2 of 4 are still missing: 0:1, 3:4 - the same command" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "COMPLETE").exists()
    assert [shard.file[5:-4] for shard in Manifest.open(tmp_path / "cache").shards] == ["train-000001", "train-000002"]
    cache_teacher.run(config(tmp_path, "--shard-range", "0:1"))
    cache_teacher.run(config(tmp_path, "--shard-range", "3:4"))
    assert content(tmp_path / "cache") == content(alone)


def test_a_ray_cluster_gives_the_bytes_of_one(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs pip install 'sollune[ray]'")
    words = [sys.executable, "-m", "stages", "cache-teacher", "--config", "configs/tiny.yaml", "--run", str(tmp_path)]
    subprocess.run([*words, *FEW, "--cluster", "ray", "--workers", "2"], check=True, timeout=300)
    assert content(tmp_path / "cache") == content(alone)


def test_ray_is_refused_by_name_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.cache.engines.find_spec", lambda _: None)
    with pytest.raises(Refused, match=r"ray is not installed - pip install 'sollune\[ray\]'"):
        cache_teacher.run(config(tmp_path, "--cluster", "ray:auto"))
