"""Landings in the format: schema 3 beside the schemas before it, in files, batches, verification, table and card."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.batch import TRAJECTORY_FIELDS, Batch, collate, concatenate
from shards.codec import decode, encode
from shards.integrity import Damaged
from shards.journal import JOURNAL_FOLDER
from shards.manifest import MANIFEST_FILE, Manifest
from shards.publish import export_index
from shards.reader import Reader
from shards.record import Landings, Record, tensors_of
from shards.stats import collect_stats, stats_lines
from shards.table import Table, write_table
from shards.verify import inspect
from shards.writer import CacheWriter
from stages.system.refusal import Refused
from tests.shards.conftest import (
    TIMES,
    C,
    H,
    W,
    fill_cache,
    fill_landed_cache,
    make_numbered_record,
    make_small_recipe,
    with_landings,
)


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_landed_cache(tmp_path_factory.mktemp("landed") / "cache")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same records without landings."""
    return fill_cache(tmp_path_factory.mktemp("plain") / "cache")


def bits(values: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return values.dtype, tuple(values.shape), values.numpy().tobytes()


def assert_same(one: Batch, other: Batch, but: tuple[str, ...] = ()) -> None:
    """Every field of two batches but some, bit for bit."""
    for name in {field.name for field in fields(Batch)} - {*but, "features"}:
        a, b = getattr(one, name), getattr(other, name)
        assert (bits(a) == bits(b)) if isinstance(a, torch.Tensor) else (a == b), name
    assert {name: bits(values) for name, values in one.features.items()} == {
        name: bits(values) for name, values in other.features.items()
    }


@pytest.mark.parametrize("times", [TIMES, (1.0,), (1.0, 0.4995), tuple(1 - i / 8 for i in range(8))])
def test_a_record_with_landings_comes_back_bit_for_bit(times: tuple[float, ...]) -> None:
    sent = with_landings(make_numbered_record(3), times)
    back = decode(*encode(sent))
    assert back.landings is not None
    assert (sent.schema, back.schema, len(back.landings)) == (3, 3, len(times))
    one, other = tensors_of(sent), tensors_of(back)
    assert list(one) == list(other)
    assert all(bits(values) == bits(other[name]) for name, values in one.items())
    assert encode(back) == encode(sent)


def test_landings_change_nothing_else_of_a_record() -> None:
    record = make_numbered_record(3)
    json_bytes, st_bytes = encode(with_landings(record))
    plain_json, plain_st = encode(record)
    assert json.loads(json_bytes) == json.loads(plain_json) | {"schema_version": 3, "landings": 4}
    assert encode(replace(with_landings(record), landings=None)) == (plain_json, plain_st)
    back, again = decode(json_bytes, st_bytes), decode(plain_json, plain_st)
    for name, values in tensors_of(again).items():
        assert bits(values) == bits(tensors_of(back)[name])
    header = json.loads(st_bytes[8 : 8 + int.from_bytes(st_bytes[:8], "little")])
    assert (header["landing_s"]["dtype"], header["landing_s"]["shape"]) == ("F32", [4])
    assert (header["landing_x"]["dtype"], header["landing_x"]["shape"]) == ("F16", [4, C, H, W])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"landings": 3}, "its landings have shapes"),
        ({"landings": 0}, "a number of landings that cannot be"),
        ({"landings": -1}, "a number of landings that cannot be"),
        ({"landings": True}, "not the keys and types"),
        ({"landings": None}, "not the keys and types"),
        ({"schema_version": 2}, "not the keys and types"),
    ],
)
def test_a_json_that_contradicts_the_landings_is_damage(change: dict[str, object], words: str) -> None:
    json_bytes, st_bytes = encode(with_landings(make_numbered_record(3)))
    changed = json.dumps(json.loads(json_bytes) | change, sort_keys=True).encode()
    with pytest.raises(Damaged, match=words):
        decode(changed, st_bytes)


def test_tensors_of_another_schema_than_the_json_are_damage() -> None:
    with_json, with_st = encode(with_landings(make_numbered_record(3)))
    plain_json, plain_st = encode(make_numbered_record(3))
    for pair in ((with_json, plain_st), (plain_json, with_st)):
        with pytest.raises(Damaged, match="other tensors than the schema"):
            decode(*pair)


@pytest.mark.parametrize(
    ("landings", "words"),
    [
        (Landings(torch.tensor(TIMES), torch.zeros(3, C, H, W).half()), "landing_x has shape"),
        (Landings(torch.tensor(TIMES), torch.zeros(4, C, W, H).half()), "landing_x has shape"),
        (Landings(torch.tensor(TIMES).double(), torch.zeros(4, C, H, W).half()), "landing_s is torch.float64"),
        (Landings(torch.tensor(TIMES), torch.zeros(4, C, H, W)), "landing_x is torch.float32"),
        (Landings(torch.empty(0), torch.zeros(0, C, H, W).half()), "landing_s has shape"),
    ],
)
def test_landings_of_another_form_are_not_written(landings: Landings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(replace(make_numbered_record(0), landings=landings))


def test_a_record_of_no_size_has_no_landings() -> None:
    with pytest.raises(ValueError, match="has not the keys and types of the schema"):
        encode(with_landings(replace(make_numbered_record(0), size=None)))


def test_one_cache_never_holds_both(tmp_path: Path) -> None:
    for schema, record in ((2, with_landings(make_numbered_record(0))), (3, make_numbered_record(0))):
        writer = CacheWriter(tmp_path / str(schema), make_small_recipe().in_schema(schema))
        with pytest.raises(ValueError, match=f"schema {record.schema}, its cache of schema {schema}"):
            writer.add("train", 0, [record])
        assert not writer.manifest.shards


def test_landings_at_other_times_do_not_belong_into_one_shard(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, make_small_recipe().in_schema(3))
    records = [with_landings(make_numbered_record(0)), with_landings(make_numbered_record(1), (1.0, 0.6, 0.4, 0.2))]
    with pytest.raises(ValueError, match="has landings at"):
        writer.add("train", 0, records)


def read_both(cache: Path, **options: object) -> tuple[Batch, Batch]:
    """One epoch from memory, and the same read state by state."""
    batches = []
    for budget in (1 << 30, 0):
        reader = Reader(cache, "train", 7, workers=0, memory_budget_bytes=budget, **options)  # type: ignore[arg-type]
        batches.append(reader.gather(*reader.order.at(np.arange(reader.samples_per_epoch))))
    return batches[0], batches[1]


def test_landings_are_the_same_from_memory_from_the_stream_and_from_records(landed: Path) -> None:
    held, streamed = read_both(landed, landings=True)
    assert_same(held, streamed)
    by_key = {record.key: record for record in Reader(landed).records()}
    assert_same(held, collate([by_key[key] for key in held.keys], held.state_index.tolist(), landings=True))
    for row, key in enumerate(held.keys):
        record = by_key[key]
        assert record.landings is not None
        assert held.landing_x is not None
        assert held.landing_s is not None
        assert held.trajectory is not None
        assert held.guidance_scale is not None
        assert bits(held.landing_x[row, :-1]) == bits(record.landings.x)
        assert bits(held.landing_x[row, -1]) == bits(record.x0)
        assert held.landing_s[row].tolist() == [*TIMES, 0.0]
        assert bool(held.trajectory[row]) == bool(record.states.trajectory[held.state_index[row]])
        assert float(held.guidance_scale[row]) == record.guidance_scale
    assert (held.landing_x.dtype, held.landing_s.dtype) == (torch.float16, torch.float32)
    assert (held.guidance_scale.dtype, held.trajectory.dtype) == (torch.float32, torch.bool)


def test_landings_move_no_other_tensor_and_no_sample(landed: Path, plain: Path) -> None:
    for with_them, without in zip(read_both(landed, landings=True), read_both(plain), strict=True):
        assert_same(with_them, without, but=TRAJECTORY_FIELDS)
    for unread, without in zip(read_both(landed), read_both(plain), strict=True):
        assert_same(unread, without)
        assert all(getattr(unread, name) is None for name in TRAJECTORY_FIELDS)


def test_landings_of_several_sizes_come_with_their_pictures(tmp_path: Path) -> None:
    cache = fill_landed_cache(tmp_path / "cache", several_sizes=True)
    assert not list(inspect(cache, Manifest.open(cache)))
    for budget in (1 << 30, 0):
        reader = Reader(cache, "train", 3, 4, memory_budget_bytes=budget, landings=True)
        seen = set()
        for _, batch in zip(range(6), reader.batches(), strict=False):
            assert batch.landing_x is not None
            assert batch.landing_x.shape[2:] == batch.x_s.shape[1:]
            seen.add(batch.size)
            for row, key in enumerate(batch.keys):
                own = reader.record(key).landings
                assert own is not None
                assert torch.equal(batch.landing_x[row, :-1], own.x)
        assert len(seen) == 2


def test_rows_with_landings_are_selected_moved_and_joined_with_the_others(landed: Path) -> None:
    batch, _ = read_both(landed, landings=True)
    assert batch.landing_x is not None
    assert batch.landing_s is not None
    assert_same(concatenate([batch.rows(slice(0, 5)), batch.rows(slice(5, None))]), batch)
    moved = batch.to("cpu", torch.float64)
    assert moved.landing_x is not None
    assert moved.landing_s is not None
    assert moved.landing_x.dtype == moved.x_s.dtype == torch.float64
    assert moved.landing_s.dtype == torch.float32
    with pytest.raises(ValueError, match="with landings and without"):
        concatenate([batch, read_both(landed)[0]])


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_the_picture_is_the_one_landing_of_a_cache_of_an_earlier_schema(plain: Path, budget: int) -> None:
    for cache in (plain, Path("tests/golden/data/cache")):
        reader = Reader(cache, landings=True, memory_budget_bytes=budget, batch_size=6)
        batch = next(reader.batches(0))
        assert batch.landing_x is not None
        assert batch.landing_s is not None
        assert batch.landing_s.tolist() == [[0.0]] * 6
        records = {record.key: record for record in reader.records()}
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.landing_x[row, 0], records[key].x0)


def test_a_cache_without_landings_is_refused_by_its_schema(plain: Path) -> None:
    words = rf"{plain}: schema 2, .* no landings, .* - .*render\.states\.windows 4"
    with pytest.raises(Refused, match=words):
        Manifest.open(plain).refuse_without_landings(plain)
    golden = Path("tests/golden/data/cache")
    with pytest.raises(Refused, match=r"schema 1.*--fast\.identity-share 1"):
        Manifest.open(golden).refuse_without_landings(golden)


def test_a_lost_manifest_comes_back_from_the_journal_in_its_schema(landed: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(landed, tmp_path / "cache"))
    whole = (cache / MANIFEST_FILE).read_bytes()
    (cache / MANIFEST_FILE).unlink()
    CacheWriter(cache, make_small_recipe().in_schema(3))
    assert (cache / MANIFEST_FILE).read_bytes() == whole
    assert (cache / JOURNAL_FOLDER).is_dir()
    (cache / MANIFEST_FILE).unlink()
    with pytest.raises(Refused, match="made by another recipe"):
        CacheWriter(cache, make_small_recipe())


def verified(cache: Path) -> list[str]:
    return [fault.reason for fault in inspect(cache, Manifest.open(cache))]


def test_a_good_cache_with_landings_is_whole_with_its_table(landed: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(landed, tmp_path / "cache"))
    write_table(cache)
    assert verified(cache) == []
    assert len(Table.open(cache)) == 18


def rewritten(cache: Path, change: dict[int, Record]) -> Path:
    """A cache of schema 3 with other records in places of its first shard."""
    writer = CacheWriter(cache, make_small_recipe().in_schema(3))
    for index in (0, 1):
        numbers = range(2 * index, 2 * index + 2)
        writer.add("train", index, [change.get(n, with_landings(make_numbered_record(n))) for n in numbers])
    return cache


@pytest.mark.parametrize(
    "times",
    [
        (1.0, 0.5, 0.75, 0.25),
        (1.0, 0.5, 0.5, 0.25),
        (0.999, 0.75, 0.5, 0.25),
        (1.0, 0.75, 0.5, 0.0),
        (1.0, 0.5, 0.2, -0.1),
    ],
)
def test_landings_that_do_not_fall_from_noise_are_found(tmp_path: Path, times: tuple[float, ...]) -> None:
    change = {n: with_landings(make_numbered_record(n), times) for n in (0, 1)}
    assert "should fall from 1 and end above 0" in verified(rewritten(tmp_path / "cache", change))[0]


def test_landings_at_other_times_than_those_before_are_found(tmp_path: Path) -> None:
    change = {n: with_landings(make_numbered_record(n), (1.0, 0.8, 0.5, 0.25)) for n in (2, 3)}
    faults = verified(rewritten(tmp_path / "cache", change))
    assert len(faults) == 1
    assert "has landings at [1.0, 0.8" in faults[0]
    assert "000000000 of data/train-000000.tar has them at" in faults[0]


@pytest.mark.parametrize("times", [(1.0, 0.5), (1.0,)])
def test_another_number_of_landings_is_found_and_not_read(tmp_path: Path, times: tuple[float, ...]) -> None:
    change = {n: with_landings(make_numbered_record(n), times) for n in (2, 3)}
    cache = rewritten(tmp_path / "cache", change)
    assert "landing_" in verified(cache)[0]
    with pytest.raises(Damaged, match="unlike the records before it"):
        list(Reader(cache).records())
    with pytest.raises(Damaged, match="unlike the records before it"):
        read_both(cache, landings=True)


def test_a_landing_that_is_not_finite_is_found(tmp_path: Path) -> None:
    record = with_landings(make_numbered_record(1))
    assert record.landings is not None
    record.landings.x[2, 0, 0, 0] = float("nan")
    assert verified(rewritten(tmp_path / "cache", {1: record})) == ["landing_x: not finite"]


@pytest.mark.parametrize(("filled", "claimed"), [(fill_cache, 3), (fill_landed_cache, 2)])
def test_records_of_another_schema_than_their_manifest_are_damage(tmp_path: Path, filled, claimed: int) -> None:
    cache = filled(tmp_path / "cache")
    manifest = Manifest.open(cache)
    changed = {"schema_version": claimed, "recipe": manifest.recipe.in_schema(claimed)}
    manifest.model_copy(update=changed).save(cache)
    shutil.rmtree(cache / JOURNAL_FOLDER)
    assert all(f"is of schema {5 - claimed}, the cache of schema {claimed}" in fault for fault in verified(cache))
    assert len(verified(cache)) == 3
    words = rf"record 0{{9}} has (4|no) landings, in a cache of schema {claimed}"
    with pytest.raises(Damaged, match=words):
        next(Reader(cache).records())
    with pytest.raises(Damaged, match=words):
        next(iter(Reader(cache).headers()))


def test_card_and_statistics_name_the_landings(landed: Path, plain: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(landed, tmp_path / "cache"))
    export_index(cache, "mit", "landed")
    card = (cache / "README.md").read_text()
    assert f"| safetensors | `landing_x` | float16 | m x {C} x {H} x {W} |" in card
    assert "| safetensors | `landing_s` | float32 | m |" in card
    assert "| json | `landings` | int |" in card
    assert "m is 4" in card
    reader = Reader(cache)
    line = next(line for line in stats_lines(reader, collect_stats(reader)) if line.startswith("landings"))
    assert int(line.split()[1].replace(",", "")) == 9 * 4 * (4 + 2 * C * H * W)
    assert not any(line.startswith("landings") for line in stats_lines(Reader(plain), collect_stats(Reader(plain))))
