import os
import shutil

import pytest

from shards.archive import Shard
from shards.files import handle as stamps
from shards.reader import Reader
from stages.system.refusal import Refused


@pytest.fixture
def hashed(monkeypatch):
    """The shards that were read whole; files count as rested at once."""
    monkeypatch.setattr(stamps, "RESTED_SECONDS", -1.0)
    checked, true = [], Shard.fault
    monkeypatch.setattr(Shard, "fault", lambda shard, folder: checked.append(shard.file) or true(shard, folder))
    return checked


def read_all_records(cache):
    """A batch of every sample, from the shards."""
    return next(Reader(cache, batch_size=14, memory_budget_bytes=0).batches())


def test_a_shard_is_read_whole_once_a_machine(cache, hashed):
    read_all_records(cache)
    assert sorted(hashed) == ["data/train-000000.tar", "data/train-000001.tar"]
    read_all_records(cache)
    assert len(hashed) == 2


def test_a_recently_changed_file_is_hashed_again(cache, hashed, monkeypatch):
    monkeypatch.setattr(stamps, "RESTED_SECONDS", 1000.0)
    read_all_records(cache)
    read_all_records(cache)
    assert len(hashed) == 4


def test_a_stamped_shard_that_changed_is_refused_even_with_its_old_time(cache, hashed):
    read_all_records(cache)
    path = cache / "data/train-000001.tar"
    before = path.stat()
    with open(path, "r+b") as tar:
        tar.seek(9000)
        tar.write(b"\x55")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Refused, match=r"train-000001\.tar: sha256"):
        read_all_records(cache)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("change", ["written", "cut", "replaced", "pipe", "link"])
def test_a_shard_that_changes_under_its_reader_is_refused(cache, hashed, change, split):
    batches = Reader(cache, split, batch_size=14, memory_budget_bytes=0, workers=0).batches()
    next(batches)
    path = cache / f"data/{split}-000000.tar"
    if change == "cut":
        os.truncate(path, 5000)
    elif change == "replaced":
        shutil.copy(cache / "data/train-000001.tar", cache / "other")
        (cache / "other").replace(path)
    elif change == "pipe":
        path.unlink()
        os.mkfifo(path)  # who opens it waits for ever
    elif change == "link":
        path.rename(cache / "moved")
        path.symlink_to(cache / "moved")
    else:
        with open(path, "r+b") as tar:
            tar.seek(5000)
            tar.write(b"\x55")
    with pytest.raises(Refused, match=rf"{split}-000000\.tar: (sha256|\d records|is a link|is no plain file)"):
        next(batches)


def test_stamps_lie_with_the_user_and_not_in_the_cache(cache, hashed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = sorted(cache.rglob("*"))
    read_all_records(cache)
    assert sorted(cache.rglob("*")) == before
    assert len([path for path in (tmp_path / "home/sollune/verified").rglob("*") if path.is_file()]) == 2


def test_without_a_place_for_stamps_every_run_verifies(cache, hashed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    read_all_records(cache)
    read_all_records(cache)
    assert len(hashed) == 4
