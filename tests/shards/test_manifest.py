import json
import os

import pytest

from shards.integrity import Damaged, append_seal
from shards.manifest import Manifest, Recipe, find_cache
from shards.reader import Reader
from stages.system.refusal import Refused
from tests.cache_checks import open_verified


def test_a_manifest_comes_back_as_it_was_saved(cache, tmp_path):
    manifest = Manifest.open(cache)
    (tmp_path / "copy").mkdir()
    manifest.save(tmp_path / "copy")
    assert Manifest.open(tmp_path / "copy") == manifest
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


def test_it_records_what_each_shard_holds(cache):
    first, second, held_out = Manifest.open(cache).shards
    assert (first.file, first.records, first.draws, first.first_key, first.last_key) == (
        "data/train-000000.tar",
        4,
        8,
        "000000000",
        "000000003",
    )
    assert (second.records, held_out.split, held_out.records) == (3, "validation", 2)
    assert first.bytes == (cache / first.file).stat().st_size


def test_a_shard_takes_one_line(cache):
    lines = (cache / "manifest.json").read_text().splitlines()
    assert sum('"file": "data/' in line for line in lines) == 3


def test_verify_accepts_a_whole_cache(cache):
    assert open_verified(cache) == Manifest.open(cache)


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"manifest\.json: not there.*run make cache-teacher"):
        Manifest.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not good JSON"),
        ("[]", "schema_version None, this program reads 1, 2 and 3"),
        ('{"schema_version": 4}', "schema_version 4, this program reads 1, 2 and 3"),
        ('{"schema_version": true}', "schema_version True, this program reads 1, 2 and 3"),
        ('{"schema_version": 1}', "recipe: Field required"),
        ('{"schema_version": 1, "recipe": {"identity": {}}, "extra": 1}', "extra: Extra inputs"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(tmp_path, text, words):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(Refused, match=rf"manifest\.json: .*{words}"):
        Manifest.open(tmp_path)


def test_another_recipe_is_refused_with_the_field_and_both_values(cache):
    other = Recipe(identity={"sampling": {"steps": 30, "guidance": 5.0}})
    with pytest.raises(Refused, match=r"sampling\.steps was 25, is now 30 - choose another run folder"):
        Manifest.open(cache).check_recipe(other, cache)


def test_the_same_recipe_from_other_software_is_accepted(cache):
    Manifest.open(cache).check_recipe(Recipe(identity={"sampling": {"steps": 25, "guidance": 5.0}}))


def test_a_shard_cut_between_two_records_is_refused_with_its_count(cache):
    shard = Manifest.open(cache).shards[0]
    end = shard.offsets[3].json_offset - 512
    os.truncate(cache / shard.file, end)
    with pytest.raises(
        Refused,
        match=r"train-000000\.tar: 3 records, manifest says 4, first in record 000000003 at byte .*shards repair",
    ):
        open_verified(cache)


@pytest.mark.parametrize("inside", ["json_offset", "st_offset"])
def test_a_shard_cut_inside_a_record_is_refused_with_its_count(cache, inside):
    shard = Manifest.open(cache).shards[1]
    os.truncate(cache / shard.file, getattr(shard.offsets[2], inside) + 1)
    with pytest.raises(Refused, match=r"train-000001\.tar: 2 records, manifest says 3"):
        open_verified(cache)


def test_a_shard_without_its_padding_is_refused(cache):
    shard = Manifest.open(cache).shards[0]
    os.truncate(cache / shard.file, shard.bytes - 512)
    with pytest.raises(Refused, match=rf"train-000000\.tar: {shard.bytes - 512} bytes, manifest says {shard.bytes}"):
        open_verified(cache)


def test_one_changed_byte_is_refused(cache):
    shard = Manifest.open(cache).shards[2]
    with open(cache / shard.file, "r+b") as content:
        content.seek(shard.offsets[1].st_offset + shard.offsets[1].st_size - 1)
        content.write(b"\x55")
    with pytest.raises(Refused, match=r"validation-000000\.tar: sha256"):
        open_verified(cache)


def test_a_missing_shard_is_refused(cache):
    (cache / "data" / "train-000001.tar").unlink()
    with pytest.raises(Refused, match=r"train-000001\.tar: missing"):
        open_verified(cache)


@pytest.mark.parametrize("sealed_again", [False, True])
def test_a_manifest_that_places_records_elsewhere_is_refused(cache, sealed_again):
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][0]["offsets"][1][0] += 512
    (cache / "manifest.json").write_text(json.dumps(manifest))
    if sealed_again:
        body = (cache / "manifest.json").read_text().rpartition('"sha256"')[0]
        (cache / "manifest.json").write_text(append_seal(body))
    with pytest.raises(Damaged, match=r"data/train-000000\.tar: places a record at byte \d+, where none can lie"):
        Manifest.open(cache)


def test_a_manifest_whose_numbers_were_changed_is_refused(cache):
    content = (cache / "manifest.json").read_bytes()
    (cache / "manifest.json").write_bytes(content.replace(b'"guidance": 5.0', b'"guidance": 6.0'))
    with pytest.raises(Damaged, match=r"manifest\.json: sha256 of its first \d+ bytes is"):
        Manifest.open(cache)


@pytest.mark.parametrize("file", ["/etc/passwd", "../train-000000.tar", "data/../../x.tar", "data/train-0.tar"])
def test_names_that_lead_out_of_the_folder_are_refused(cache, file):
    content = (cache / "manifest.json").read_text().rpartition('"sha256"')[0].replace("data/train-000000.tar", file)
    (cache / "manifest.json").write_text(append_seal(content))
    with pytest.raises(Damaged, match=r"manifest\.json: shards\.0\.file: String should match pattern"):
        Manifest.open(cache)


@pytest.mark.parametrize("linked", ["data/train-000001.tar", "data"])
def test_a_link_is_refused(cache, tmp_path, linked):
    (cache / linked).rename(tmp_path / "elsewhere")
    (cache / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match="is a link, which may lead anywhere"):
        Reader(cache)


def test_a_run_folder_stands_for_the_cache_inside_it(cache):
    assert find_cache(cache.parent) == cache
    assert find_cache(cache) == cache


def test_a_run_folder_whose_manifest_is_lost_stands_for_the_cache_inside_it(cache):
    (cache / "manifest.json").unlink()
    assert find_cache(cache.parent) == cache
    assert find_cache(cache) == cache
