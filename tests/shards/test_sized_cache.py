"""A cache of several sizes: its files, what verify sees of them, the table, the card, and caches of schema 1."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import braceexpand
import datasets
import pytest
import torch
import webdataset
from safetensors.torch import load

from configs.values import PictureSize
from shards.__main__ import main
from shards.archive import Failure
from shards.integrity import Damaged
from shards.journal import entries_of
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import SPLITS
from shards.table import Table, write_table
from shards.verify import inspect, quarantine
from shards.writer import CacheWriter
from stages.system.refusal import Refused
from tests.shards.conftest import SIZES, make_numbered_record, make_sized_record, make_small_recipe, size_of_number

GOLDEN = Path("tests/golden/data/cache")


@pytest.fixture(scope="module")
def whole(make_sized_cache, tmp_path_factory):
    folder = make_sized_cache(tmp_path_factory.mktemp("sized") / "cache")
    write_table(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "cache")


def reseal(cache: Path, manifest: Manifest) -> None:
    """Make manifest and journal agree, and drop the table."""
    manifest.model_copy(update={"table": ()}).save(cache)
    shutil.rmtree(cache / "table.zarr", ignore_errors=True)
    shutil.rmtree(cache / "journal")
    (cache / "journal").mkdir()
    for name, entry in entries_of(manifest).items():
        (cache / name).write_text(entry.text())


def faults(cache: Path) -> list[str]:
    return [f"{fault.file}: {fault.reason}" for fault in inspect(cache, Manifest.open(cache))]


def test_a_shard_is_named_by_its_size_and_numbered_within_it(whole):
    manifest = Manifest.open(whole)
    assert [shard.file for shard in manifest.shards_of("train")] == [
        "data/train-24x48-000000.tar",
        "data/train-24x48-000001.tar",
        "data/train-40x32-000000.tar",
        "data/train-40x32-000001.tar",
        "data/train-48x24-000000.tar",
        "data/train-48x24-000001.tar",
    ]
    assert manifest.sizes_of("train") == manifest.sizes_of() == (SIZES[1], SIZES[0], SIZES[2])
    for shard in manifest.shards:
        assert shard.file.endswith(f"-{shard.size}-{shard.file[-10:]}")
        assert f'"size": "{shard.size}"' in (whole / "journal" / f"{Path(shard.file).stem}.json").read_text()
    split = [manifest.totals("train", size).records for size in SIZES]
    assert split == [6, 4, 4]
    assert faults(whole) == []


def test_the_same_cache_is_made_again_byte_for_byte(whole, make_sized_cache, tmp_path):
    again = make_sized_cache(tmp_path / "again")
    write_table(again)
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        assert (again / path).read_bytes() == (whole / path).read_bytes(), path


def test_a_shard_is_finished_and_forgotten_by_its_size(copy):
    writer = CacheWriter(copy, make_small_recipe())
    assert all(writer.is_intact("train", 0, 3, size) and writer.is_finished("train", 0, 3, size) for size in SIZES)
    assert not writer.is_intact("train", 0, 3)
    assert writer.is_finished_now("train", 0, 3, SIZES[0])
    assert not writer.is_finished_now("train", 2, 3, SIZES[0])
    assert writer.prompt_count("train") == 14
    writer.forget("train", 0, SIZES[0])
    assert not writer.is_finished("train", 0, 3, SIZES[0])
    assert writer.is_finished("train", 0, 3, SIZES[1])


@pytest.mark.parametrize(
    ("sizes", "named", "words"),
    [
        ((SIZES[0], SIZES[1]), SIZES[0], "000000001 has size 24x48, others have 40x32"),
        ((SIZES[0],), SIZES[1], "named otherwise than its size 40x32"),
        ((SIZES[0],), None, r"train-000000\.tar and data/.*-24x48-000000\.tar are named in two ways"),
        ((None,), None, r"train-000000\.tar: its size is None, in schema 2"),
    ],
)
def test_records_that_do_not_belong_into_a_shard_are_not_written(copy, sizes, named, words):
    before = (copy / "manifest.json").read_bytes()
    records = [
        make_sized_record(number, size) if size else replace(make_numbered_record(number), size=None)
        for number, size in enumerate(sizes)
    ]
    with pytest.raises(ValueError, match=words):
        CacheWriter(copy, make_small_recipe()).add("train", 0, records, size=named)
    assert (copy / "manifest.json").read_bytes() == before


def test_two_sizes_in_shards_without_a_size_in_their_name_are_not_written(tmp_path):
    writer = CacheWriter(tmp_path, make_small_recipe())
    writer.add("train", 0, [make_sized_record(0, SIZES[0])])
    with pytest.raises(ValueError, match=r"has size 24x48, .* has 40x32, and neither name tells it"):
        writer.add("train", 1, [make_sized_record(1, SIZES[1])])


def test_two_sizes_of_other_pixels_a_place_are_damage(tmp_path):
    writer = CacheWriter(tmp_path, make_small_recipe())
    for number, (size, factor) in enumerate(((SIZES[0], 1), (SIZES[1], 2))):
        record = make_sized_record(number, size)
        size = PictureSize(factor * size.width, factor * size.height)
        writer.add("train", 0, [replace(record, size=size)], size=size)
    first = "record 000000000 of data/train-40x32-000000.tar has 3 channels of 8 pixels a place"
    fault = f"v_cond has 3 channels of 16 pixels a place, {first}"
    assert any(fault in seen for seen in faults(tmp_path))
    with pytest.raises(Damaged, match="unlike the records before it"):
        list(Reader(tmp_path).headers())


def move_shard(cache: Path, old: str, new: str, **changes: object) -> None:
    """Give a shard another name, and the manifest an entry that agrees but for the records."""
    manifest = Manifest.open(cache)
    shard = next(shard for shard in manifest.shards if shard.file == old)
    (cache / old).rename(cache / new)
    moved = shard.model_copy(update={"file": new, **changes})
    reseal(cache, manifest.without_shard(old).with_shard(moved))


def test_a_shard_in_the_place_of_another_size_is_damage(copy):
    move_shard(copy, "data/train-48x24-000001.tar", "data/train-24x48-000002.tar", size=SIZES[1])
    seen = faults(copy)
    assert seen == ["data/train-24x48-000002.tar: has size 48x24, manifest says 24x48"]
    for memory_budget_bytes in (0, 1 << 30):
        with pytest.raises(Damaged, match=r"has size 48x24, manifest says 24x48|unlike the records"):
            list(zip(range(20), Reader(copy, memory_budget_bytes=memory_budget_bytes).batches(), strict=False))
    assert [path.name for path in quarantine(copy)] == ["train-24x48-000002.tar"]


def test_a_shard_named_by_another_size_is_no_manifest(copy):
    manifest = Manifest.open(copy)
    text = manifest.text().replace('"split": "train", "size": "48x24"', '"split": "train", "size": "24x48"')
    body = text[: text.rindex('"sha256"')]
    from shards.integrity import append_seal

    (copy / "manifest.json").write_text(append_seal(body))
    with pytest.raises(Damaged, match="named otherwise than its size 24x48"):
        Manifest.open(copy)


def test_a_missing_number_of_one_size_is_seen(copy):
    move_shard(copy, "data/train-24x48-000000.tar", "data/train-24x48-000002.tar")
    assert "data/train-24x48-000000.tar: missing: data/train-24x48-000001.tar is there" in faults(copy)[0]


def test_a_key_that_two_sizes_have_is_seen(copy):
    writer = CacheWriter(copy, make_small_recipe())
    numbers = [n for n in range(14) if size_of_number(n) == SIZES[2]]
    records = [replace(make_sized_record(50 + n, SIZES[2]), key=f"{n:09d}") for n in [0, *numbers[-1:]]]
    writer.forget("train", 1, SIZES[2])
    writer.add("train", 1, records, size=SIZES[2])
    seen = faults(copy)
    assert any(
        "train-48x24-000001.tar: has key 000000000, as data/train-40x32-000000.tar has" in fault for fault in seen
    )


def test_a_key_that_no_size_has_is_seen(copy):
    writer = CacheWriter(copy, make_small_recipe())
    numbers = [n for n in range(14) if size_of_number(n) == SIZES[0]]
    writer.forget("train", 0, SIZES[0])
    writer.add("train", 0, [make_sized_record(n, SIZES[0]) for n in (numbers[0], numbers[2])], size=SIZES[0])
    missing = numbers[1]
    seen = [fault for fault in faults(copy) if "table" not in fault]
    assert len(seen) == 1
    assert f"has key {missing + 1:09d}, and no shard has {missing:09d} (1 keys are in none)" in seen[0]


def test_a_prompt_that_failed_is_not_missing(copy):
    writer = CacheWriter(copy, make_small_recipe())
    numbers = [n for n in range(14) if size_of_number(n) == SIZES[0]][:3]
    writer.forget("train", 0, SIZES[0])
    records = [make_sized_record(n, SIZES[0]) for n in (numbers[0], numbers[2])]
    writer.add("train", 0, records, [(f"{numbers[1]:09d}", "its picture is not finite")], SIZES[0])
    write_table(copy)
    assert faults(copy) == []
    assert Manifest.open(copy).failures == (
        Failure(file="data/train-40x32-000000.tar", key=f"{numbers[1]:09d}", reason="its picture is not finite"),
    )


def test_a_damaged_shard_of_one_size_is_moved_aside_and_made_again(copy, make_sized_cache):
    file = "data/train-48x24-000000.tar"
    good = (copy / file).read_bytes()
    (copy / file).write_bytes(good[:700] + b"\x55" + good[701:])
    assert [fault.split(": ")[0] for fault in faults(copy)] == [file]
    assert [path.relative_to(copy / "quarantine/0000").as_posix() for path in quarantine(copy)] == [file]
    make_sized_cache(copy)
    assert (copy / file).read_bytes() == good


def test_the_table_tells_the_size_of_each_row(whole):
    table, at = Table.open(whole), 0
    for split in SPLITS:
        for record in Reader(whole).records(split):
            rows = slice(at, at + len(record.states))
            assert set(table.column("width")[rows]) == {record.size.width}
            assert set(table.column("height")[rows]) == {record.size.height}
            at += len(record.states)
    assert at == len(table)


def test_a_row_of_the_table_of_another_size_is_seen(copy):
    import zarr

    from shards.table import table_files

    group = zarr.open_group(copy / "table.zarr", mode="r+", zarr_format=3)
    group["width"][3] = 25
    Manifest.open(copy).model_copy(update={"table": table_files(copy)}).save(copy)
    assert any("the table has another width" in fault for fault in faults(copy))


def test_commands_tell_the_sizes(whole, capsys):
    assert main(["verify", str(whole)]) == 0
    assert "train: its records are 4 of 24x48, 6 of 40x32, 4 of 48x24" in capsys.readouterr().out
    assert main(["stats", str(whole)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("size "))
    assert [line.split()[:3] for line in lines[first + 1 : first + 4]] == [
        ["24x48", "3", "5"],
        ["40x32", "3", "8"],
        ["48x24", "3", "5"],
    ]
    assert main(["show", str(whole), "000000001"]) == 0
    assert "size            24x48\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_a_card_names_the_sizes_and_every_loader_reads_all_of_them(copy, tmp_path, capsys):
    assert main(["export-index", str(copy), "--license", "mit"]) == 0
    card = (copy / "README.md").read_text()
    assert "| 24x48 | train | 2 | 4 | 8 |" in card
    assert "| safetensors | `x0` | float16 | 3 x h x w |" in card
    assert "| json | `width` | int | | of the picture in pixels |" in card
    pattern = card.split('webdataset.WebDataset("')[1].split('"')[0]
    shards = [shard.file for shard in Manifest.open(copy).shards_of("train")]
    assert sorted(braceexpand.braceexpand(pattern)) == shards
    wanted = {record.key: record.size for record in Reader(copy).records()}
    by_webdataset = webdataset.WebDataset(f"{copy}/{pattern}", shardshuffle=False, empty_check=False)
    read = {sample["__key__"]: load(sample["safetensors"])["x0"].shape for sample in by_webdataset}
    assert read == {key: torch.Size((3, size.height // 8, size.width // 8)) for key, size in wanted.items()}
    rows = datasets.load_dataset(str(copy), cache_dir=str(tmp_path / "arrow"))["train"]
    assert {row["__key__"]: (row["json"]["width"], row["json"]["height"]) for row in rows} == {
        key: (size.width, size.height) for key, size in wanted.items()
    }
    listed = json.loads((copy / "wids-train.json").read_text())
    assert [entry["url"] for entry in listed["shardlist"]] == shards


# Schema 1


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "golden")


def test_a_cache_of_schema_1_is_read_and_tells_no_size(golden):
    manifest = Manifest.open(golden)
    assert (manifest.schema_version, manifest.sizes_of(), manifest.shards[0].size) == (1, (None,), None)
    assert manifest.text() == (golden / "manifest.json").read_text()
    reader = Reader(golden, batch_size=4)
    assert reader.sizes == (None,)
    assert next(reader.batches()).size is next(reader.records()).size is None
    named = Reader(golden, batch_pixels=4 * 64 * 64, unstated_size=PictureSize(64, 64))
    batch = next(named.batches())
    assert (batch.size, len(batch), named.sizes) == (PictureSize(64, 64), 4, (PictureSize(64, 64),))
    assert batch.keys == next(reader.batches()).keys
    with pytest.raises(Refused, match="does not tell the size of its pictures"):
        next(Reader(golden, batch_pixels=4 * 64 * 64).batches())


@pytest.mark.parametrize("lost", [[], ["manifest.json"], ["manifest.json", "table.zarr"]])
def test_a_cache_of_schema_1_is_continued_and_repaired_in_schema_1(golden, lost):
    manifest = Manifest.open(golden)
    for name in lost:
        shutil.rmtree(golden / name) if (golden / name).is_dir() else (golden / name).unlink()
    records = [replace(record, size=PictureSize(64, 64)) for record in Reader(GOLDEN).records()]
    writer = CacheWriter(golden, manifest.recipe.in_schema(2))
    assert writer.is_intact("train", 0, 4)
    good = (golden / "data/train-000001.tar").read_bytes()
    writer.forget("train", 1)
    writer.add("train", 1, records[4:])
    assert (golden / "data/train-000001.tar").read_bytes() == good
    write_table(golden)
    assert Manifest.open(golden) == manifest
    assert faults(golden) == []
    for path in sorted(path.relative_to(GOLDEN) for path in GOLDEN.rglob("*") if path.is_file()):
        assert (golden / path).read_bytes() == (GOLDEN / path).read_bytes(), path


def test_a_recipe_differs_in_what_it_says_and_not_in_its_schema(golden):
    recipe = Manifest.open(golden).recipe
    other = recipe.model_copy(update={"schema_version": 2, "identity": {**recipe.identity, "dtype": "float16"}})
    with pytest.raises(Refused, match=r"made by another recipe: dtype was .* is now .float16") as refusal:
        CacheWriter(golden, other)
    assert "schema" not in str(refusal.value)


def test_a_record_of_schema_1_in_a_cache_of_schema_2_is_damage(copy, golden):
    manifest = Manifest.open(golden)
    shards = tuple(shard.model_copy(update={"size": PictureSize(64, 64)}) for shard in manifest.shards)
    forged = manifest.model_copy(
        update={"schema_version": 2, "recipe": manifest.recipe.in_schema(2), "shards": shards, "table": ()}
    )
    reseal(golden, forged)
    assert "has size None, manifest says 64x64" in faults(golden)[0]
    for budget in (0, 1 << 30):
        with pytest.raises(Damaged, match="has size None, manifest says 64x64"):
            next(Reader(golden, memory_budget_bytes=budget).batches())


@pytest.mark.parametrize(
    ("schema", "recipe_schema", "size", "words"),
    [
        (2, 1, SIZES[0], "schema 2 with a recipe of schema 1"),
        (1, 2, None, "schema 1 with a recipe of schema 2"),
        (2, 2, None, "its size is None, in schema 2"),
        (1, 1, SIZES[0], "its size is 40x32, in schema 1"),
    ],
)
def test_a_manifest_of_two_schemas_is_damage(golden, schema, recipe_schema, size, words):
    manifest = Manifest.open(golden)
    shards = tuple(shard.model_copy(update={"size": size}) for shard in manifest.shards)
    recipe = manifest.recipe.model_copy(update={"schema_version": recipe_schema})
    mixed = manifest.model_copy(update={"schema_version": schema, "recipe": recipe, "shards": shards})
    mixed.save(golden)
    with pytest.raises(Damaged, match=words):
        Manifest.open(golden)
