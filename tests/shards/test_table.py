import json

import numpy as np
import pytest
import torch
import zarr

from shards import table as table_module
from shards import table as tabulate
from shards.integrity import Damaged
from shards.reader import Reader
from shards.stats import Statistics
from shards.table import Table, write_table
from shards.writer import CacheWriter
from stages.system.refusal import Refused


def folder_content(folder):
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("rows_per_file", [16384, 3])
def test_the_table_holds_what_the_shards_hold(cache, monkeypatch, rows_per_file):
    monkeypatch.setattr(tabulate, "ROWS_PER_FILE", rows_per_file)
    monkeypatch.setattr(tabulate, "ROWS_PER_CHUNK", 3 if rows_per_file == 3 else 1024)
    write_table(cache)
    table, reader = Table.open(cache), Reader(cache)
    records = [*reader.records("train"), *reader.records("validation")]
    assert table.key.tolist() == [int(record.key) for record in records for _ in range(2)]
    assert table.state_index.tolist() == [0, 1] * 9
    assert table.s.tolist() == [s for record in records for s in record.states.s.tolist()]
    assert table.k.tolist() == [k for record in records for k in record.states.k.tolist()]
    assert table.blocks == ("mid", "down_0")
    for block in table.blocks:
        expected = torch.cat([record.features.by_block[block] for record in records])
        assert table.features(block).equal(expected)
        assert table.features(block, np.array([17, 3, 3])).equal(expected[[17, 3, 3]])


def test_two_tables_of_the_same_shards_are_the_same_bytes(cache, make_cache, tmp_path):
    other = make_cache(tmp_path / "other")
    write_table(cache)
    write_table(other)
    assert folder_content(cache / "table.zarr") == folder_content(other / "table.zarr")
    write_table(cache)
    assert folder_content(cache / "table.zarr") == folder_content(other / "table.zarr")


def test_rows_are_selected_by_split(cache):
    write_table(cache)
    table = Table.open(cache)
    assert table.rows("validation").tolist() == [14, 15, 16, 17]
    assert table.rows("train").tolist() == [*range(14)]
    assert len(table) == 18


@pytest.mark.parametrize("rows_at_once", [4096, 3])
def test_statistics_are_those_of_the_training_states_of_each_bin(cache, monkeypatch, rows_at_once):
    monkeypatch.setattr(table_module, "ROWS_AT_ONCE", rows_at_once)
    write_table(cache)
    records = list(Reader(cache).records("train"))
    s = torch.cat([record.states.s for record in records])
    statistics = Table.open(cache).statistics(bins=3)
    assert list(statistics) == ["mid", "down_0"]
    for block, one in statistics.items():
        features = torch.cat([record.features.by_block[block] for record in records]).double()
        for i in range(3):
            rows = features[(s >= i / 3) & (s < (i + 1) / 3)]
            assert one.count[i].item() == len(rows) > 1
            torch.testing.assert_close(one.mean[i], rows.mean(0))
            torch.testing.assert_close(one.std()[i], rows.std(0))
        torch.testing.assert_close(one.merge_bins().mean[0], features.mean(0))
        torch.testing.assert_close(one.merge_bins().std(correction=0)[0], features.std(0, correction=0))


@pytest.mark.parametrize("cut", [False, True])
def test_statistics_are_refused_of_a_damaged_table(cache, cut):
    write_table(cache)
    path = cache / "table.zarr/feature_mid/c/0/0"
    good = path.read_bytes()
    table = Table.open(cache)
    path.write_bytes(good[:-1] if cut else bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(Damaged, match=r"feature_mid/c/0/0: (sha256|\d+ bytes)"):
        table.statistics()


def test_statistics_survive_a_large_mean():
    values = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e7
    statistics = Statistics.empty(1, 2)
    for part in values.split(7):
        statistics = statistics.merge(Statistics.from_values(part, torch.zeros(len(part), dtype=torch.int64), 1))
    torch.testing.assert_close(statistics.std()[0], values.std(0), rtol=1e-7, atol=0)


def test_the_attributes_identify_the_cache(cache, make_recipe):
    write_table(cache)
    attributes = json.loads((cache / "table.zarr/zarr.json").read_text())["attributes"]
    assert attributes["schema_version"] == 2
    assert attributes["recipe_sha256"] == make_recipe().fingerprint()
    assert attributes["blocks"] == ["mid", "down_0"]
    assert attributes["class_names"] == ["shape/disc", "shape/ring", "shape/star"]


def test_a_missing_table_is_refused(cache):
    with pytest.raises(Refused, match=r"table\.zarr: not there"):
        Table.open(cache)


def test_a_table_of_other_shards_is_refused(cache, make_recipe, make_record):
    write_table(cache)
    CacheWriter(cache, make_recipe()).add("train", 2, [make_record(7)])
    with pytest.raises(Refused, match=r"table\.zarr: was made from other shards"):
        Table.open(cache)


def test_unknown_blocks_and_columns_are_refused_with_the_nearest(cache):
    write_table(cache)
    table = Table.open(cache)
    with pytest.raises(Refused, match="block middle: not in the table - did you mean mid"):
        table.features("middle")
    with pytest.raises(Refused, match="column clas: not in the table - did you mean class"):
        table.column("clas")


def test_a_failure_leaves_no_half_table(cache, monkeypatch):
    def full(*_words, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(Refused, match=r"table\.zarr: cannot be written \(No space left on device\)"):
        write_table(cache)
    assert sorted(path.name for path in cache.iterdir()) == ["data", "journal", "manifest.json"]
