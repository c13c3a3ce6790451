"""Laws of filling a cache: several processes share it, and a prompt that cannot be made is told."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.refusal import Refused
from shards.manifest import Recipe, verify
from shards.record import BlockFeatures, Draws, Record
from shards.writer import CacheWriter
from stages.cluster import fill, refuse_surplus, tasks_of
from stages.prompts import Prompt

RECIPE = Recipe(identity={"steps": 2})


def asked(count: int) -> list[Prompt]:
    return [Prompt(f"star {i}", "star", i) for i in range(count)]


def record(prompt: Prompt, key: str) -> Record:
    generator = torch.Generator().manual_seed(prompt.seed)
    half = torch.randn(2, 3, 4, 5, generator=generator).half()
    draws = Draws(torch.arange(2), torch.rand(2, generator=generator), half, half, half, torch.tensor([True, False]))
    features = BlockFeatures({"mid": half.mean(dim=(2, 3))})
    return Record(key, prompt.text, prompt.class_name, prompt.seed, 5.0, half[0, 0], half[0], draws, features)


def make(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
    return [record(prompt, key) for prompt, key in zip(prompts, keys, strict=True)]


def filled(folder: Path, count: int, maker=make) -> Path:
    writer, tasks = CacheWriter(folder, RECIPE), tasks_of({"train": asked(count)}, 4)
    refuse_surplus(writer, tasks)
    fill(writer, tasks, 2, maker)
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


def test_a_prompt_that_cannot_be_made_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    def fragile(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        if any(prompt.seed == 5 for prompt in prompts):
            raise RuntimeError("no such\nword")
        return make(prompts, keys)

    manifest = verify(filled(tmp_path, 8, fragile))
    assert [(one.key, one.reason) for one in manifest.failures] == [("000000005", "RuntimeError: no such word")]
    assert [shard.records for shard in manifest.shards] == [4, 3]


def test_an_answer_that_is_not_finite_is_told(tmp_path: Path) -> None:
    def wild(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        records = make(prompts, keys)
        bad = records[0].draws.v_cond.clone().fill_(float("inf"))
        return [replace(records[0], draws=replace(records[0].draws, v_cond=bad)), *records[1:]]

    manifest = verify(filled(tmp_path, 2, wild))
    assert [(one.key, one.reason) for one in manifest.failures] == [("000000000", "v_cond is not finite")]


def test_what_fails_for_every_prompt_is_no_prompts_fault(tmp_path: Path) -> None:
    def broken(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        filled(tmp_path, 4, broken)


def test_fewer_prompts_than_are_held_are_refused(tmp_path: Path) -> None:
    whole = content(filled(tmp_path, 8))
    with pytest.raises(Refused, match="holds 8 train prompts, 6 are asked for"):
        filled(tmp_path, 6)
    assert content(tmp_path) == whole
    assert verify(filled(tmp_path, 10)).shards[-1].records == 2
