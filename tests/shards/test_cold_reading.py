"""Rows of files that the system does not hold in memory are fetched many at a time, and are the same rows."""

import itertools
import os
from collections import Counter

import pytest

from shards import rows
from shards.files import handle
from shards.opened import OpenShards
from shards.reader import Reader

ROW_FIELDS = ("x_s", "v_cond", "v_uncond", "s", "k", "cond", "state_index")


def first_batches(cache, count=4, **options):
    return list(itertools.islice(Reader(cache, batch_size=5, memory_budget_bytes=0, **options).batches(), count))


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys == b.keys
        assert all(getattr(a, name).equal(getattr(b, name)) for name in ROW_FIELDS)
        assert all(a.features[block].equal(b.features[block]) for block in b.features)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("most_waiting", [0, 1, 64])
def test_rows_that_the_disk_must_be_waited_for_are_the_same(cache, monkeypatch, workers, most_waiting):
    """Of three reads one is at hand, one is not, and one is there in part only."""
    expected, number, read_cached = first_batches(cache), itertools.count(), OpenShards.read_cached

    def sometimes(self, shard, offset, buffers, size):
        turn = next(number) % 3
        if turn == 1:
            buffers[0][: len(buffers[0]) // 2] = b"\xff" * (len(buffers[0]) // 2)
        return turn == 0 and read_cached(self, shard, offset, buffers, size)

    monkeypatch.setattr(OpenShards, "read_cached", sometimes)
    monkeypatch.setattr(rows, "MAX_WAITING_READS", most_waiting)
    assert_same(first_batches(cache, workers=workers), expected)


def test_a_file_system_that_cannot_tell_what_it_holds_gives_the_same_rows(cache, monkeypatch):
    expected, preadv = first_batches(cache), os.preadv

    def unable(fd, buffers, offset, flags=0):
        if flags:
            raise OSError(95, "Operation not supported")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", unable)
    assert_same(first_batches(cache, workers=0), expected)


def test_a_file_that_another_thread_leaves_out_meanwhile_is_read_to_its_end(cache, monkeypatch):
    """Its number may be that of another file by then."""
    expected, preadv, seen = first_batches(cache), os.preadv, []
    open_verified = OpenShards._open_verified

    def opened(self, shard):
        if self not in seen:
            seen.append(self)
        return open_verified(self, shard)

    def beside_others(fd, buffers, offset, flags=0):
        for shards in seen:
            shards._handles.clear()
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(OpenShards, "_open_verified", opened)
    monkeypatch.setattr(os, "preadv", beside_others)
    assert_same(first_batches(cache, workers=0), expected)


def test_what_is_waited_for_is_fetched_first_and_no_more_than_a_bounded_number_at_a_time(cache, monkeypatch):
    events, read_into = [], OpenShards.read_into
    reader = Reader(cache, batch_size=5, memory_budget_bytes=0, workers=0)
    reader.batch(reader.own_samples(next(reader.schedule.blocks(0))))  # opens shards and reads headers
    monkeypatch.setattr(rows, "MAX_WAITING_READS", 3)
    monkeypatch.setattr(OpenShards, "read_cached", lambda *_: False)
    monkeypatch.setattr(OpenShards, "fetch", lambda _, shard, first, size: events.append(("fetch", first, size)))

    def reads(self, shard, offset, buffers, size):
        events.append(("read", offset, size))
        read_into(self, shard, offset, buffers, size)

    monkeypatch.setattr(OpenShards, "read_into", reads)
    reader.batch(reader.own_samples(next(reader.schedule.blocks(0))))
    fetched = [event[1:] for event in events if event[0] == "fetch"]
    assert fetched == [event[1:] for event in events if event[0] == "read"]
    ahead = list(itertools.accumulate(1 if event[0] == "fetch" else -1 for event in events))
    assert (min(ahead), max(ahead), ahead[-1]) == (0, 4, 0)


@pytest.mark.parametrize("size", [1, 4096, 10_000, 3 * 4096])
def test_a_span_longer_than_the_read_ahead_is_fetched_in_pieces_that_cover_it_once(cache, monkeypatch, size):
    """Linux fetches only the beginning of what is longer, and does not say so."""
    reader, pieces = Reader(cache), []
    monkeypatch.setattr(handle, "read_ahead_bytes", lambda _: 4096)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, first, length, advice: pieces.append((first, length)))
    OpenShards(cache).fetch(reader.shards[0], 100, size)
    covered = Counter(byte for first, length in pieces for byte in range(first, first + length))
    assert covered == Counter(range(100, 100 + size))
    assert max(length for _, length in pieces) <= 4096


def test_the_read_ahead_of_an_unknown_device_is_the_default_of_linux():
    assert handle.read_ahead_bytes(os.makedev(0, 0xFFFF)) == handle.DEFAULT_READ_AHEAD_BYTES
