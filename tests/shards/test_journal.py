"""The journal of a cache that others change while it is read: what vanishes is not finished, and ends nothing."""

import os
from pathlib import Path

import pytest

from shards import archive, journal
from shards.journal import ShardJournal, broken_entries, is_of_schema_1, journal_faults
from shards.manifest import Manifest
from shards.writer import CacheWriter

FIRST, LAST = "train-000000.json", "validation-000000.json"


def remove_at(monkeypatch, module, function, gone, *, at=None):
    """Let `gone` vanish when a function is called for a file of the name `at` (default: its own), before it begins."""
    call = getattr(module, function)

    def call_later(path, *arguments):
        if Path(path, *arguments[:1] if function == "checked_path" else ()).name == (at or gone.name):
            gone.unlink(missing_ok=True)
        return call(path, *arguments)

    monkeypatch.setattr(module, function, call_later)


def journal_of(cache):
    return ShardJournal(cache, Manifest.open(cache).recipe.fingerprint())


@pytest.mark.parametrize("at", [FIRST, LAST], ids=["between listing and looking", "between looking and reading"])
def test_an_entry_that_vanishes_while_it_is_read_is_not_finished(cache, monkeypatch, at):
    remove_at(monkeypatch, journal, "read_at_most", cache / "journal" / LAST, at=at)
    read = journal_of(cache)
    assert sorted(read.entries()) == ["data/train-000000.tar", "data/train-000001.tar"]
    assert read.entry("data/validation-000000.tar") is None


def test_a_writer_goes_on_without_an_entry_that_vanishes(cache, monkeypatch, make_recipe):
    (cache / "manifest.json").unlink()
    remove_at(monkeypatch, journal, "read_at_most", cache / "journal" / LAST)
    writer = CacheWriter(cache, make_recipe())
    assert not writer.is_finished("validation", 0, 2)
    assert writer.is_finished("train", 1, 3)


@pytest.mark.parametrize("function", ["read_at_most", "checked_path"])
def test_faults_name_an_entry_that_vanishes_while_it_is_checked(cache, monkeypatch, function):
    remove_at(monkeypatch, journal, function, cache / "journal" / LAST)
    (fault,) = journal_faults(cache, Manifest.open(cache))
    assert fault.file == f"journal/{LAST}"
    assert "missing - sollune shards repair" in fault.reason


@pytest.mark.parametrize("function", ["read_at_most", "checked_path"])
def test_an_entry_that_vanishes_is_not_broken_and_tells_no_schema(cache, monkeypatch, function):
    for path in (cache / "journal").iterdir():
        remove_at(monkeypatch, journal, function, path)
    assert not is_of_schema_1(cache)
    assert list(broken_entries(cache)) == []


def test_a_journal_that_is_removed_while_it_is_listed_has_no_entry(cache, monkeypatch):
    def vanish(_path, _pattern):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "glob", vanish)
    assert journal_of(cache).entries() == {}


def test_a_copy_that_makes_room_while_it_is_looked_at_is_in_its_store(cache, monkeypatch):
    shard = Manifest.open(cache).shards[0]
    remove_at(monkeypatch, archive, "checked_path", cache / shard.file)
    monkeypatch.setattr(archive, "absent_fault", lambda path, size: None if size == shard.bytes else str(path))
    assert shard.size_fault(cache) is None
    assert not os.path.lexists(cache / shard.file)
