import gc
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import webdataset

from shards.codec import decode, encode
from shards.manifest import Manifest, Recipe
from shards.writer import CacheWriter, write_shard
from stages.system.refusal import Refused
from tests.cache_checks import open_verified

HERE = Path(__file__).parent


def folder_content(folder):
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_runs_give_the_same_bytes(make_cache, tmp_path):
    assert folder_content(make_cache(tmp_path / "a")) == folder_content(make_cache(tmp_path / "b"))


def test_shards_written_in_another_order_give_the_same_cache(cache, make_recipe, make_record, tmp_path):
    writer = CacheWriter(tmp_path / "b", make_recipe())
    writer.add("validation", 0, map(make_record, range(100, 102)))
    writer.add("train", 1, map(make_record, range(4, 7)))
    writer.add("train", 0, map(make_record, range(4)))
    assert folder_content(tmp_path / "b") == folder_content(cache)


def test_offsets_point_at_the_members(cache, make_record):
    shard = Manifest.open(cache).shards[1]
    tar = (cache / shard.file).read_bytes()
    for number, place in zip(range(4, 7), shard.offsets, strict=True):
        members = (
            tar[place.json_offset : place.json_offset + place.json_size],
            tar[place.st_offset : place.st_offset + place.st_size],
        )
        assert members == encode(make_record(number))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_plain_webdataset_reads_the_shards(cache, make_record):
    urls = [str(cache / f"data/train-00000{i}.tar") for i in (0, 1)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(7)]
    assert [(s["json"], s["safetensors"]) for s in samples] == [encode(make_record(number)) for number in range(7)]
    gc.collect()


def test_datasets_of_the_hub_keeps_every_column(cache, make_record, tmp_path):
    files = {"train": str(cache / "data/train-*.tar"), "validation": str(cache / "data/validation-*.tar")}
    loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path / "hub"))
    rows = list(loaded["train"]) + list(loaded["validation"])
    assert set(rows[0]) == {"json", "safetensors", "__key__", "__url__"}
    for row, number in zip(rows, [*range(7), 100, 101], strict=True):
        sent, read = make_record(number), row["json"]
        assert row["__key__"] == read["key"] == sent.key
        assert (read["text"], read["class_name"], read["seed"]) == (sent.text, sent.class_name, sent.seed)
        assert read["guidance_scale"] == sent.guidance_scale
        assert read["blocks"] == ["mid", "down_0"]
        assert (read["draws"], read["schema_version"], read["width"], read["height"]) == (2, 2, 40, 32)
        assert decode(encode(sent)[0], row["safetensors"]).x0.equal(sent.x0)


KILLED = """
import os, runpy, signal, sys
from pathlib import Path
from shards.writer import CacheWriter
made = runpy.run_path(sys.argv[1])

def until_killed():
    yield from (made["make_numbered_record"](number) for number in (4, 5))
    os.kill(os.getpid(), signal.SIGKILL)

writer = CacheWriter(Path(sys.argv[2]), made["make_small_recipe"]())
writer.add("train", 0, (made["make_numbered_record"](number) for number in range(4)))
writer.add("train", 1, until_killed())
"""


def test_a_killed_run_goes_on_to_the_bytes_of_an_uninterrupted_one(cache, make_cache, tmp_path):
    folder = tmp_path / "killed"
    words = [sys.executable, "-c", KILLED, str(HERE / "conftest.py"), str(folder)]
    killed = subprocess.run(words, cwd=HERE.parents[1], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(folder.glob("data/.train-000001.tar.*.partial"))
    assert [shard.file for shard in Manifest.open(folder).shards] == ["data/train-000000.tar"]

    before = (folder / "data/train-000000.tar").stat().st_mtime_ns
    make_cache(folder)
    assert (folder / "data/train-000000.tar").stat().st_mtime_ns == before
    assert folder_content(folder) == folder_content(cache)


def test_a_shard_that_only_the_journal_lists_is_entered_when_the_cache_is_opened_again(cache, make_recipe, make_cache):
    """Killed between journal and manifest: when nothing else is left to make, the last shard would never be entered."""
    whole = folder_content(cache)
    Manifest.open(cache).without_shard("data/validation-000000.tar").save(cache)
    assert folder_content(cache) != whole
    make_cache(cache)
    assert folder_content(cache) == whole
    Manifest.open(cache).without_shard("data/validation-000000.tar").save(cache)
    CacheWriter(cache, make_recipe())
    assert folder_content(cache) == whole


def test_a_damaged_shard_counts_as_unfinished_and_is_made_again(cache, make_cache):
    whole = folder_content(cache)
    shard = Manifest.open(cache).shards[0]
    with open(cache / shard.file, "r+b") as tar:
        tar.seek(shard.offsets[0].st_offset + 300)
        tar.write(b"\xff\xff")
    make_cache(cache)
    assert folder_content(cache) == whole


def test_a_longer_list_of_prompts_remakes_only_the_shard_that_grew(cache, make_recipe):
    writer = CacheWriter(cache, make_recipe())
    assert writer.is_intact("train", 0, 4)
    assert not writer.is_intact("train", 1, 4)
    assert not writer.is_intact("train", 2, 4)


def test_another_recipe_is_refused_before_anything_is_written(cache):
    whole = folder_content(cache)
    with pytest.raises(Refused, match=r"cache: made by another recipe: sampling\.steps was 25, is now 26;"):
        CacheWriter(cache, Recipe(identity={"sampling": {"steps": 26}}))
    assert folder_content(cache) == whole


def test_failed_prompts_are_recorded_and_count_as_done(tmp_path, make_recipe, make_record):
    writer, failures = CacheWriter(tmp_path, make_recipe()), []

    def records():
        yield make_record(0)
        failures.append(("000000001", "the teacher gave nan"))
        yield make_record(2)

    writer.add("train", 0, records(), failures)
    again = CacheWriter(tmp_path, make_recipe())
    assert again.is_intact("train", 0, 3)
    assert [(one.file, one.key, one.reason) for one in again.manifest.failures] == [
        ("data/train-000000.tar", "000000001", "the teacher gave nan")
    ]
    again.add("train", 0, map(make_record, range(3)))
    assert open_verified(tmp_path).failures == ()


def test_nothing_is_left_when_making_a_record_fails(tmp_path, make_record):
    def records():
        yield make_record(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_shard(tmp_path, "train", 0, records())
    assert folder_content(tmp_path) == {}


@pytest.mark.parametrize(("numbers", "words"), [((1, 1), "keys must rise"), ((2, 1), "keys must rise")])
def test_keys_of_a_shard_must_rise(tmp_path, make_record, numbers, words):
    with pytest.raises(ValueError, match=words):
        write_shard(tmp_path, "train", 0, map(make_record, numbers))


def test_records_of_a_shard_must_have_as_many_states(tmp_path, make_record):
    with pytest.raises(ValueError, match="000000001 has 3 states, others have 2"):
        write_shard(tmp_path, "train", 0, [make_record(0), make_record(1, state_count=3)])


def test_a_shard_without_records_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"train-000000\.tar: none of its 0 prompts gave a record"):
        write_shard(tmp_path, "train", 0, [])


FULL = """
import resource, runpy, sys
from pathlib import Path
from stages.system.refusal import Refused
from shards.writer import CacheWriter
made = runpy.run_path(sys.argv[1])
writer = CacheWriter(Path(sys.argv[2]), made["make_small_recipe"]())
writer.add("train", 0, (made["make_numbered_record"](number) for number in range(4)))
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    writer.add("train", 1, (made["make_numbered_record"](number) for number in range(4, 40)))
except Refused as refusal:
    print(refusal)
"""


def test_a_file_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path, make_recipe):
    words = [sys.executable, "-c", FULL, str(HERE / "conftest.py"), str(tmp_path)]
    result = subprocess.run(words, cwd=HERE.parents[1], check=True, capture_output=True, text=True)
    assert "data/train-000001.tar: cannot be written (File too large)" in result.stdout
    assert result.stderr == ""
    assert sorted(folder_content(tmp_path)) == ["data/train-000000.tar", "journal/train-000000.json", "manifest.json"]
    assert CacheWriter(tmp_path, make_recipe()).is_intact("train", 0, 4)
