"""Caches whose sizes contradict themselves, and sizes that are none: refused in one line that names the thing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.values import PictureSize
from shards.integrity import append_seal
from shards.journal import entries_of
from shards.manifest import Manifest, Recipe
from shards.record import Record
from shards.writer import CacheWriter
from tests.shards.conftest import SIZES, fill_sized_cache, make_sized_record

Break = Callable[[Path], object]
FIRST = "data/train-24x48-000000.tar"


def in_manifest(old: str, new: str) -> Break:
    """The manifest with one word changed in all its places, and a good seal."""

    def broken(cache: Path) -> None:
        body = (cache / "manifest.json").read_text().rpartition('"sha256"')[0]
        assert old in body
        (cache / "manifest.json").write_text(append_seal(body.replace(old, new)))

    return broken


def claims_another_size(cache: Path) -> None:
    """Shards of one size under the name of another, and a manifest that agrees."""
    manifest = Manifest.open(cache)
    for shard in manifest.shards:
        if shard.size == SIZES[1]:
            file = shard.file.replace("24x48", "24x40")
            (cache / shard.file).rename(cache / file)
            moved = shard.model_copy(update={"file": file, "size": PictureSize(24, 40)})
            manifest = manifest.without_shard(shard.file).with_shard(moved)
    manifest.save(cache)


def other_pixels_a_place(cache: Path) -> None:
    """One size whose pictures are twice as large as the others for the same latents."""
    shutil.rmtree(cache)
    writer = CacheWriter(cache, Recipe(identity={"made_for": "this test"}))
    for number, (size, factor) in enumerate(((SIZES[0], 1), (SIZES[1], 2))):
        claimed = PictureSize(factor * size.width, factor * size.height)
        record: Record = replace(make_sized_record(number, size), size=claimed)
        writer.add("train", 0, [record], size=claimed)


CACHES: dict[str, tuple[Break, list[str]]] = {
    "a later schema": (
        in_manifest('"schema_version": 2', '"schema_version": 4'),
        ["manifest.json", "schema_version 4", "reads 1, 2 and 3"],
    ),
    "a schema of landings that are not there": (
        in_manifest('"schema_version": 2', '"schema_version": 3'),
        [FIRST, "has no landings, in a cache of schema 3", "repair"],
    ),
    "a schema that is true": (
        in_manifest('"schema_version": 2', '"schema_version": true'),
        ["manifest.json", "schema_version True"],
    ),
    "an earlier schema": (
        in_manifest('"schema_version": 2', '"schema_version": 1'),
        ["manifest.json", "in schema 1", "repair"],
    ),
    "a size that is none": (in_manifest('"size": "24x48"', '"size": "24 x 48"'), ["shards.0", "WIDTHxHEIGHT"]),
    "a size of nothing": (in_manifest('"size": "24x48"', '"size": "0x48"'), ["shards.0", "WIDTHxHEIGHT"]),
    "a shard without a size": (in_manifest('"size": "24x48", ', ""), [FIRST, "named otherwise than its size None"]),
    "a shard of another size than its name": (in_manifest('"size": "24x48"', '"size": "48x24"'), [FIRST, "48x24"]),
    "a shard without a size in its name": (
        in_manifest("train-24x48-000000.tar", "train-000000.tar"),
        ["named in two ways"],
    ),
    "records of another size than their shard": (
        claims_another_size,
        ["train-24x40-000000.tar", "has size 24x48, manifest says 24x40", "repair"],
    ),
    "sizes of other pixels a place": (other_pixels_a_place, ["unlike the records before it", "repair"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_sized_cache(tmp_path_factory.mktemp("whole") / "cache")


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_contradicting_sizes_is_refused(name: str, whole: Path, tmp_path: Path, refused) -> None:
    broken, named = CACHES[name]
    cache = Path(shutil.copytree(whole, tmp_path / "cache"))
    broken(cache)
    refused(["shards", "stats", str(cache)], *named)
    refused(["shards", "export-index", str(cache)], *named)


@pytest.mark.parametrize(
    "size", ["512", "512x", "x512", "0x64", "64x0", "-64x64", "64X64", "64x64x64", "64.0x64", " 64x64"]
)
def test_a_view_of_a_size_that_is_none_is_refused(size: str, tmp_path: Path, refused) -> None:
    words = ["distill", "--config", "configs/tiny.yaml", "--run", str(tmp_path), f"--view.size={size}"]
    refused(words, "view.size", "WIDTHxHEIGHT in pixels, such as 512x768")


def test_an_entry_of_the_journal_that_is_of_another_schema_is_left_out(whole: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(whole, tmp_path / "cache"))
    manifest = Manifest.open(cache)
    file, entry = next(iter(entries_of(manifest).items()))
    fields = json.loads(entry.text())
    del fields["sha256"], fields["shard"]["size"]
    body = "{\n" + "".join(f'"{name}": {json.dumps(value)},\n' for name, value in fields.items())
    (cache / file).write_text(append_seal(body))
    writer = CacheWriter(cache, manifest.recipe)
    assert not writer.is_finished_now("train", 0, 3, SIZES[1])
    assert len(writer.manifest.shards) == len(manifest.shards)
