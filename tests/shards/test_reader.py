import gc
import itertools
import os
from pathlib import Path

import pytest
import torch

from shards.manifest import Manifest
from shards.opened import MAX_OPEN_FILES
from shards.reader import Reader
from shards.writer import CacheWriter
from stages.system.refusal import Refused

TRAIN = range(7)


def samples(reader, start, count):
    """(key, state) of the next `count` samples of a reader from `start` on."""
    batches = itertools.islice(reader.batches(start), -(-count // reader.batch_size))
    pairs = [pair for batch in batches for pair in zip(batch.keys, batch.state_index.tolist(), strict=True)]
    return pairs[:count]


def test_records_come_in_the_order_of_the_shards(cache, make_record):
    reader = Reader(cache)
    assert [record.key for record in reader.records()] == [f"{number:09d}" for number in TRAIN]
    assert [record.key for record in reader.records("validation")] == ["000000100", "000000101"]
    assert [reader.record_at(number).text for number in TRAIN] == [make_record(number).text for number in TRAIN]


def test_a_record_is_found_by_its_key(cache, make_record):
    assert Reader(cache).record("000000005").x0.equal(make_record(5).x0)
    assert Reader(cache).record("000000101", "validation").x0.equal(make_record(101).x0)


def test_an_unknown_key_is_refused_with_the_keys_there_are(cache):
    with pytest.raises(Refused, match="no record 000000100 in split train - keys are 000000000 to 000000006"):
        Reader(cache).record("000000100")


@pytest.mark.parametrize("memory_budget_bytes", [2 << 30, 10_000, 0])
def test_a_row_is_the_state_of_the_record_that_it_names(cache, make_record, memory_budget_bytes):
    reader = Reader(cache, batch_size=5, memory_budget_bytes=memory_budget_bytes)
    for batch in itertools.islice(reader.batches(), 6):
        assert len(batch) == 5
        for row, (key, state) in enumerate(zip(batch.keys, batch.state_index.tolist(), strict=True)):
            sent = make_record(int(key))
            assert (batch.texts[row], batch.class_names[row]) == (sent.text, sent.class_name)
            assert batch.cond[row].equal(sent.cond)
            for name in ("k", "s", "x_s", "v_cond", "v_uncond"):
                assert getattr(batch, name)[row].equal(getattr(sent.states, name)[state])
            assert list(batch.features) == list(sent.features.by_block)
            for block, values in sent.features.by_block.items():
                assert batch.features[block][row].equal(values[state])


def test_memory_does_not_change_what_is_read(cache):
    large, small = (Reader(cache, batch_size=3, memory_budget_bytes=budget) for budget in (2 << 30, 0))
    for a, b in itertools.islice(zip(large.batches(), small.batches(), strict=True), 8):
        assert a.keys == b.keys
        assert all(getattr(a, name).equal(getattr(b, name)) for name in ("cond", "x_s", "v_cond", "v_uncond", "s", "k"))
        assert a.state_index.dtype == b.state_index.dtype == torch.int64


def test_an_epoch_holds_every_state_once(cache):
    reader = Reader(cache, batch_size=4)
    everything = sorted((f"{number:09d}", state) for number in TRAIN for state in range(2))
    assert reader.samples_per_epoch == 14
    assert sorted(samples(reader, 0, 14)) == everything
    assert sorted(samples(reader, 28, 14)) == everything


@pytest.mark.parametrize("start", [1, 4, 13, 14, 31])
def test_starting_at_n_is_skipping_n(cache, start):
    assert (
        samples(Reader(cache, batch_size=4), start, 20) == samples(Reader(cache, batch_size=4), 0, start + 20)[start:]
    )


def test_the_order_does_not_depend_on_the_batch_size(cache):
    assert samples(Reader(cache, batch_size=3), 0, 30) == samples(Reader(cache, batch_size=10), 0, 30)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_ranks_share_out_the_stream(cache, world, start):
    whole = samples(Reader(cache, batch_size=6), start, 36)
    ranks = [samples(Reader(cache, batch_size=6, rank=r, world=world), start, 36 // world) for r in range(world)]
    for rank, own in enumerate(ranks):
        assert own == [pair for n, pair in enumerate(whole, start) if n % world == rank]
    assert sorted(itertools.chain(*ranks)) == sorted(whole)


def test_a_weighted_stream_follows_the_weights(cache):
    weights = {"shape/star": 8.0, "shape/disc": 2.0, "shape/ring": 0.0}
    reader = Reader(cache, batch_size=500, class_weights=weights)
    names = [name for batch in itertools.islice(reader.batches(), 4) for name in batch.class_names]
    assert set(names) == {"shape/star", "shape/disc"}
    assert abs(names.count("shape/star") / 2000 - 0.8) < 3 * (0.8 * 0.2 / 2000) ** 0.5


def test_moving_a_batch_changes_floats_but_not_times(cache):
    batch = next(Reader(cache, batch_size=2).batches()).to("cpu", torch.bfloat16)
    assert {t.dtype for t in (batch.cond, batch.x_s, batch.v_cond, *batch.features.values())} == {torch.bfloat16}
    assert (batch.s.dtype, batch.k.dtype, batch.state_index.dtype) == (torch.float32, torch.int64, torch.int64)


def test_a_cut_shard_is_refused_when_opened(cache):
    os.truncate(cache / "data/train-000001.tar", 9000)
    with pytest.raises(Refused, match=r"train-000001\.tar: \d records, manifest says 3"):
        Reader(cache)


def test_a_missing_shard_is_refused_when_opened(cache):
    (cache / "data/train-000000.tar").unlink()
    with pytest.raises(Refused, match=r"train-000000\.tar: missing"):
        Reader(cache)


@pytest.mark.parametrize("memory_budget_bytes", [2 << 30, 0])
def test_a_changed_shard_is_refused_before_its_first_record(cache, memory_budget_bytes):
    shard = Manifest.open(cache).shards[0]
    with open(cache / shard.file, "r+b") as tar:
        tar.seek(shard.offsets[2].st_offset + shard.offsets[2].st_size - 1)
        tar.write(b"\x55")
    reader = Reader(cache, batch_size=14, memory_budget_bytes=memory_budget_bytes)
    with pytest.raises(Refused, match=r"train-000000\.tar: sha256"):
        next(reader.batches())


def test_a_split_without_records_is_refused(tmp_path, make_recipe, make_record):
    CacheWriter(tmp_path, make_recipe()).add("train", 0, [make_record(0)])
    with pytest.raises(Refused, match="holds no record of split validation"):
        Reader(tmp_path, "validation")


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_shards_than_open_files_are_read(tmp_path, make_recipe, make_record):
    writer = CacheWriter(tmp_path, make_recipe())
    for index in range(MAX_OPEN_FILES + 3):
        writer.add("train", index, [make_record(index)])
    gc.collect()
    before = open_files()
    reader = Reader(tmp_path, batch_size=2 * (MAX_OPEN_FILES + 3), memory_budget_bytes=0, workers=0)
    assert len(set(next(reader.batches()).keys)) == MAX_OPEN_FILES + 3
    assert open_files() - before == MAX_OPEN_FILES
    del reader
    gc.collect()
    assert open_files() == before
