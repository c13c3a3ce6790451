"""Laws of filling a cache: several processes share it, and a prompt that cannot be made is reported."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.values import PictureSize
from shards.manifest import Recipe
from shards.record import BlockFeatures, Record, States
from shards.writer import CacheWriter
from stages.cache.fill import fill, ranges, refuse_surplus, tasks_in, tasks_of
from stages.cache.sizes import RenderSizes
from stages.prompts import Prompt
from stages.system.refusal import Refused
from stages.system.signals import interrupt_on
from tests.cache_checks import open_verified

SIZE = PictureSize(40, 32)
RECIPE = Recipe(identity={"steps": 2})
SIZE = PictureSize(40, 32)
SIZES = RenderSizes(SIZE)


def requested(count: int) -> list[Prompt]:
    return [Prompt(f"star {i}", "star", i) for i in range(count)]


def record(prompt: Prompt, key: str) -> Record:
    generator = torch.Generator().manual_seed(prompt.seed)
    half = torch.randn(2, 3, 4, 5, generator=generator).half()
    states = States(torch.arange(2), torch.rand(2, generator=generator), half, half, half, torch.tensor([True, False]))
    features = BlockFeatures({"mid": half.mean(dim=(2, 3))})
    return Record(key, prompt.text, prompt.class_name, prompt.seed, 5.0, half[0, 0], half[0], states, features, SIZE)


def make(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
    return [record(prompt, key) for prompt, key in zip(prompts, keys, strict=True)]


def filled(folder: Path, count: int, maker=make) -> Path:
    writer, tasks = CacheWriter(folder, RECIPE), tasks_of({"train": requested(count)}, 4, 2, SIZES)
    refuse_surplus(writer, tasks)
    fill(writer, tasks, maker)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writers_at_once_give_the_bytes_of_one(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=filled, args=(tmp_path / "many", 40)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert content(tmp_path / "many") == content(filled(tmp_path / "one", 40))


def test_a_prompt_that_cannot_be_made_is_reported_and_the_rest_is_kept(tmp_path: Path) -> None:
    def fragile(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if any(prompt.seed == 5 for prompt in prompts):
            raise RuntimeError("no such\nword")
        return make(prompts, keys, size)

    manifest = open_verified(filled(tmp_path, 8, fragile))
    assert [(one.key, one.reason) for one in manifest.failures] == [("000000005", "RuntimeError: no such word")]
    assert [shard.records for shard in manifest.shards] == [4, 3]


def test_an_output_that_is_not_finite_is_reported(tmp_path: Path) -> None:
    def wild(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        records = make(prompts, keys, size)
        bad = records[0].states.v_cond.clone().fill_(float("inf"))
        return [replace(records[0], states=replace(records[0].states, v_cond=bad)), *records[1:]]

    manifest = open_verified(filled(tmp_path, 2, wild))
    assert [(one.key, one.reason) for one in manifest.failures] == [("000000000", "v_cond is not finite")]


def test_why_a_prompt_gave_no_record_is_printed_once_for_all_that_share_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fragile(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if any(prompt.seed in (1, 2, 5) for prompt in prompts):
            raise RuntimeError("no such word")
        return make(prompts, keys, size)

    filled(tmp_path, 8, fragile)
    printed = capsys.readouterr().out
    assert "train prompts 000000001, 000000002: no record: RuntimeError: no such word\n" in printed
    assert "train prompts 000000005: no record: RuntimeError: no such word\n" in printed


def test_a_prompt_alone_in_its_batch_fails_like_any_other(tmp_path: Path) -> None:
    def fragile(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if any(prompt.seed == 2 for prompt in prompts):
            raise RuntimeError("no such word")
        return make(prompts, keys, size)

    manifest = open_verified(filled(tmp_path, 3, fragile))
    assert [one.key for one in manifest.failures] == ["000000002"]


def test_a_shard_of_which_no_prompt_can_be_made_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wild(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        return [replace(one, x0=one.x0 * float("nan")) for one in make(prompts, keys, size)]

    with pytest.raises(Refused, match=r"none of its 4 prompts gave a record \(x0 is not finite\) - mend"):
        filled(tmp_path, 4, wild)
    assert "train prompts 000000000, 000000001, 000000002, 000000003: no record: x0" in capsys.readouterr().out


def test_what_fails_for_every_prompt_is_no_prompts_fault(tmp_path: Path) -> None:
    def broken(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        filled(tmp_path, 4, broken)


def test_fewer_prompts_than_are_held_are_refused(tmp_path: Path) -> None:
    whole = content(filled(tmp_path, 8))
    with pytest.raises(Refused, match="holds 8 train prompts, 6 are asked for"):
        filled(tmp_path, 6)
    assert content(tmp_path) == whole
    assert open_verified(filled(tmp_path, 10)).shards[-1].records == 2


def test_a_record_is_computed_in_the_same_batch_whenever_it_is_made(tmp_path: Path) -> None:
    def batch_of_keys(folder: Path, counts: Sequence[int]) -> dict[str, list[str]]:
        batch_of: dict[str, list[str]] = {}

        def recording(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
            batch_of.update({key: list(keys) for key in keys})
            return make(prompts, keys, size)

        for count in counts:
            filled(folder, count, recording)
        return batch_of

    at_once = batch_of_keys(tmp_path / "at once", [11])
    assert batch_of_keys(tmp_path / "by and by", [3, 5, 11]) == at_once
    assert at_once["000000006"] == ["000000006", "000000007"]
    assert content(tmp_path / "by and by") == content(tmp_path / "at once")


def test_a_short_shard_stays_listed_until_its_longer_successor_is_there(tmp_path: Path) -> None:
    filled(tmp_path, 6)
    listed = []

    def looking(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        listed.append([shard.records for shard in open_verified(tmp_path).shards])
        return make(prompts, keys, size)

    filled(tmp_path, 8, looking)
    assert listed == [[4, 2], [4, 2]]
    assert [shard.records for shard in open_verified(tmp_path).shards] == [4, 4]


def test_a_process_that_ends_as_a_shard_gets_longer_leaves_a_manifest_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "killed", 6)
    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "enter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            filled(tmp_path / "killed", 8)
    assert [shard.records for shard in open_verified(tmp_path / "killed").shards] == [4]
    assert content(filled(tmp_path / "killed", 8)) == content(filled(tmp_path / "whole", 8))


def test_the_next_batch_is_made_while_the_last_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next_begun, true = threading.Event(), CacheWriter.enter

    def slow(writer: CacheWriter, *arguments: Any) -> None:
        assert next_begun.wait(10), "the second shard was not begun before the first was entered"
        true(writer, *arguments)

    def recording(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if keys[0] == "000000004":
            next_begun.set()
        return make(prompts, keys, size)

    monkeypatch.setattr(CacheWriter, "enter", slow)
    assert len(open_verified(filled(tmp_path, 8, recording)).shards) == 2


def test_a_disk_that_fills_behind_the_teacher_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise Refused("no space left")

    requested_keys = []

    def recording(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        requested_keys.extend(keys)
        return make(prompts, keys, size)

    monkeypatch.setattr(CacheWriter, "add", full)
    with pytest.raises(Refused, match="no space left"):
        filled(tmp_path, 400, recording)
    assert len(requested_keys) < 100
    assert not (tmp_path / ".claims").exists()


def test_an_interrupted_shard_leaves_nothing_and_the_others_stay(tmp_path: Path) -> None:
    def interrupted(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if keys[0] == "000000006":
            os.kill(os.getpid(), signal.SIGTERM)
        return make(prompts, keys, size)

    with pytest.raises(KeyboardInterrupt), interrupt_on(signal.SIGTERM):
        filled(tmp_path / "stopped", 8, interrupted)
    assert sorted(content(tmp_path / "stopped")) == [
        "data/train-000000.tar",
        "journal/train-000000.json",
        "manifest.json",
    ]
    assert content(filled(tmp_path / "stopped", 8)) == content(filled(tmp_path / "whole", 8))


@pytest.mark.parametrize("shard_range", ["", "3", "a:b", "2:2", "3:1", "0:4", "-1:2", "1:2:3"])
def test_a_range_that_is_none_is_refused_with_the_number_of_shards(shard_range: str) -> None:
    with pytest.raises(Refused, match=r"shard_range = .* this cache has 3 shards"):
        tasks_in(tasks_of({"train": requested(9)}, 4, 2, SIZES), shard_range)


def test_ranges_are_printed_in_the_notation_of_the_option() -> None:
    tasks = tasks_of({"train": requested(9), "validation": requested(3)}, 4, 2, SIZES)
    assert [task.name for task in tasks_in(tasks, "2:4")] == ["train-000002", "validation-000000"]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0:3, 5:6, 7:9"
