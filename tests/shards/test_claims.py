"""Laws of several writers: who may make a shard, and that no finished one is lost."""

import os
import subprocess
import sys
import time

import pytest

from shards import journal
from shards.manifest import Manifest, Recipe
from shards.writer import CacheWriter, write_shard
from stages.cache import claims
from stages.cache.claims import Claims
from stages.system.atomic import temporary_path
from stages.system.ownership import is_alive, pid_namespace, process_token
from stages.system.refusal import Refused
from tests.cache_checks import open_verified


def dead_owner():
    """The name of a process of this machine that has ended."""
    words = [sys.executable, "-c", "from stages.system.ownership import process_token; print(process_token())"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def write_claim(cache, name, token, age_seconds=0.0):
    path = cache / claims.CLAIMS_FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(token)
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def test_this_process_counts_as_alive_and_an_ended_one_as_dead():
    assert is_alive(process_token()) is True
    assert is_alive(dead_owner()) is False
    assert is_alive(f"{os.getpid()}-1@{pid_namespace()}") is False  # the number was given out again
    assert is_alive("7-7@elsewhere-00000000") is None


def test_the_claim_of_a_living_process_is_respected_and_ends_with_its_context(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.acquire("train-000000")
        assert not other.acquire("train-000000")
        one.release("train-000000")
        assert other.acquire("train-000000")
    assert not (tmp_path / claims.CLAIMS_FOLDER).exists()


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    write_claim(tmp_path, "train-000000", dead_owner())
    with Claims(tmp_path) as ours:
        assert ours.acquire("train-000000")
        assert ours.owner_of("train-000000") == process_token()


@pytest.mark.parametrize(("age_seconds", "taken"), [(0, False), (claims.BEAT_SECONDS + 5, True)])
def test_an_unsigned_claim_counts_for_as_long_as_signing_takes(tmp_path, age_seconds, taken):
    write_claim(tmp_path, "train-000000", "", age_seconds)
    with Claims(tmp_path) as ours:
        assert ours.acquire("train-000000") is taken


def test_dead_claims_on_what_is_finished_do_not_stay(tmp_path):
    write_claim(tmp_path, "train-000000", dead_owner())
    write_claim(tmp_path, f".now.{dead_owner()}", "")
    with Claims(tmp_path) as ours:
        assert ours.acquire("train-000001")
    assert not (tmp_path / claims.CLAIMS_FOLDER).exists()


def test_the_last_to_leave_clears_away_what_a_killed_process_left(tmp_path):
    write_claim(tmp_path, f".now.{dead_owner()}", "")
    with Claims(tmp_path):
        pass
    assert not (tmp_path / claims.CLAIMS_FOLDER).exists()


@pytest.mark.parametrize(("age_seconds", "taken"), [(0, False), (claims.STALE_SECONDS + 5, True)])
def test_a_claim_from_another_machine_counts_while_it_is_kept_warm(tmp_path, age_seconds, taken):
    write_claim(tmp_path, "train-000000", "7-7@elsewhere-00000000", age_seconds)
    with Claims(tmp_path) as ours:
        assert ours.acquire("train-000000") is taken


def test_a_claim_that_was_taken_over_is_not_released_by_its_first_owner(tmp_path):
    with Claims(tmp_path) as slow:
        assert slow.acquire("train-000000")
        path = write_claim(tmp_path, "train-000000", "7-7@elsewhere-00000000")
        slow.release("train-000000")
        assert path.exists()
        path.unlink()


def test_two_writers_lose_no_shard_of_each_other(tmp_path, make_recipe, make_record):
    one, other = CacheWriter(tmp_path, make_recipe()), CacheWriter(tmp_path, make_recipe())
    one.add("train", 0, map(make_record, range(4)))
    other.add("train", 1, map(make_record, range(4, 7)))
    one.add("validation", 0, map(make_record, range(100, 102)))
    assert [shard.records for shard in open_verified(tmp_path).shards] == [4, 3, 2]


def test_a_shard_finished_between_journal_and_manifest_is_not_lost(tmp_path, make_recipe, make_record):
    writer = CacheWriter(tmp_path, make_recipe())
    writer.add("train", 0, map(make_record, range(4)))
    shard = write_shard(tmp_path, "train", 1, map(make_record, range(4, 7)))
    journal.ShardJournal(tmp_path, make_recipe().fingerprint()).write(shard, ())
    assert len(Manifest.open(tmp_path).shards) == 1
    again = CacheWriter(tmp_path, make_recipe())
    assert again.is_finished("train", 1, 3)
    assert len(open_verified(tmp_path).shards) == 2


def test_a_damaged_journal_entry_means_the_shard_is_made_again(tmp_path, make_recipe, make_record):
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "train-000000.json").write_text('{"recipe_sha')
    assert not CacheWriter(tmp_path, make_recipe()).is_finished("train", 0, 4)


def test_a_journal_of_another_recipe_is_refused(tmp_path, make_recipe, make_record):
    CacheWriter(tmp_path, make_recipe()).add("train", 0, map(make_record, range(4)))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(Refused, match=r"journal/train-000000\.json: made by another recipe"):
        CacheWriter(tmp_path, Recipe(identity={"sampling": {"steps": 26}}))


def test_a_forgotten_shard_is_forgotten_by_other_writers_too(tmp_path, make_recipe, make_record):
    one, other = CacheWriter(tmp_path, make_recipe()), CacheWriter(tmp_path, make_recipe())
    one.add("train", 0, map(make_record, range(4)))
    other.refresh()
    one.forget("train", 0)
    other.refresh()
    assert not other.is_finished("train", 0, 4)
    assert Manifest.open(tmp_path).shards == ()


def test_only_what_the_dead_left_half_written_is_swept(tmp_path, make_recipe):
    (tmp_path / "data").mkdir()
    mine = temporary_path(tmp_path / "data" / "train-000000.tar")
    theirs = mine.with_name(f".train-000001.tar.{dead_owner()}.partial")
    mine.touch()
    theirs.touch()
    CacheWriter(tmp_path, make_recipe())
    assert mine.exists()
    assert not theirs.exists()
