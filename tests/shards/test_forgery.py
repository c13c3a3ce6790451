"""A cache whose hashes agree but whose content is wrong, by intent or by a bug: `verify` reports it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zarr
from webdataset import TarWriter

from shards.__main__ import main
from shards.archive import Failure
from shards.codec import encode
from shards.integrity import append_seal
from shards.journal import entries_of
from shards.manifest import Manifest
from shards.record import STATE_FIELDS, BlockFeatures
from shards.table import table_files, write_table

Members = list[tuple[str, bytes, bytes]]
TRAIN = "data/train-000000.tar"


def members(records) -> Members:
    return [(record.key, *encode(record)) for record in records]


def reseal_manifest(cache: Path, manifest: Manifest) -> None:
    """Make manifest, journal and table agree."""
    manifest.save(cache)
    for path in (cache / "journal").iterdir():
        path.unlink()
    for name, entry in entries_of(manifest).items():
        (cache / name).write_text(entry.text())


def forge(cache: Path, forged: Members, behind: bytes = b"") -> None:
    """The first training shard with these members, and a manifest that matches."""
    path = cache / TRAIN
    with open(path, "wb") as stream, TarWriter(stream, user="sollune", group="sollune", mtime=0, encoder=False) as tar:
        for name, metadata, tensors in forged:
            tar.write({"__key__": name, "json": metadata, "safetensors": tensors})
    manifest = Manifest.open(cache)
    shard = _listed(path, forged)
    if behind:
        content = bytearray(path.read_bytes())
        end = shard.offsets[-1].last
        content[end : end + len(behind)] = behind
        path.write_bytes(content)
        shard = _listed(path, forged)
    reseal_manifest(cache, manifest.with_shard(shard))


def _listed(path: Path, forged: Members):
    """What the writer would record, also of members that `places` does not tell apart."""
    from shards import archive

    spans, at, size = [], 0, path.stat().st_size
    with open(path, "rb") as content:
        for _ in forged:
            first = archive._read_member(content, at, size)
            second = archive._read_member(content, first.end, size)
            crc32 = archive._crc32(content, at, second.end)
            spans.append(archive.RecordSpan(first.offset, first.size, second.offset, second.size, crc32))
            at = second.end
    shard = Manifest.open(path.parents[1]).shards[0]
    keys = [json.loads(metadata)["key"] for _, metadata, _ in forged]
    states = sum(json.loads(metadata)["draws"] for _, metadata, _ in forged)
    return shard.model_copy(
        update={
            "records": len(spans),
            "draws": states,
            "bytes": size,
            "sha256": archive.sha256_of(path),
            "first_key": min(keys),
            "last_key": max(keys),
            "offsets": tuple(spans),
        }
    )


def edit_json(metadata: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(metadata) | changes, sort_keys=True).encode()


def verify_output(cache: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["verify", str(cache)]) == 1
    return capsys.readouterr().err


@pytest.fixture
def four(make_record):
    return [make_record(number) for number in range(4)]


def with_value(record, name: str, value: float):
    tensor = getattr(record.states, STATE_FIELDS[name]).clone()
    tensor.view(-1)[1] = value
    return replace(record, states=replace(record.states, **{STATE_FIELDS[name]: tensor}))


def test_a_forged_cache_that_is_good_passes(cache, four, capsys):
    forge(cache, members(four))
    assert main(["verify", str(cache)]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: [m[0], m[1], m[1], m[3]], r"train-000000\.tar: its key is there twice, first in record 000000001"),
        (lambda m: [m[0], m[2], m[1], m[3]], "comes after 000000002"),
        (lambda m: [m[0], m[1], m[3]], "4 keys lie between its ends, 3 records are there"),
        (lambda m: m[:3], r"train-000001\.tar: keys 000000004 on, 000000003 should be next, first in record 000000004"),
        (lambda m: [m[0], ("000000009", *m[1][1:]), *m[2:]], "as '000000009', first in record 000000001"),
        (lambda m: [m[0], (m[1][0], json.dumps(dict(reversed(json.loads(m[1][1]).items()))).encode(), m[1][2]), *m[2:]],
         "record '000000001': its JSON is not in the form in which it is written"),
        (lambda m: [m[0], (m[1][0], edit_json(m[1][1], extra=1), m[1][2]), *m[2:]], "has not the keys and types"),
        (lambda m: [m[0], (m[1][0], edit_json(m[1][1], guidance_scale=3), m[1][2]), *m[2:]],
         "has not the keys and types"),
        (lambda m: [m[0], (m[1][0], edit_json(m[1][1], seed=-1), m[1][2]), *m[2:]], "a key, seed or number of states"),
        (lambda m: [m[0], (m[1][0], m[1][1], m[1][2][:-2]), *m[2:]], "record 000000001: not good safetensors"),
        (lambda m: [m[0], (m[1][0], m[1][1], m[1][2].replace(b'"F16"', b'"I16"', 1)), *m[2:]], "not good safetensors"),
        (lambda m: [m[0], (m[1][0], edit_json(m[0][1], key="000000001"), m[0][2]), *m[2:]],
         "has the text and the seed of record 000000000 of data/train-000000.tar: the same record twice"),
    ],
)  # fmt: skip
def test_unexpected_members_are_reported(cache, four, capsys, change: Callable[[Members], Members], words: str):
    forge(cache, change(members(four)))
    assert re.search(words, verify_output(cache, capsys))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("v_cond", float("nan"), "v_cond: not finite, first in record 000000002"),
        ("x_t", float("inf"), "x_t: not finite, first in record 000000002"),
        ("s", float("nan"), "s: not finite"),
        ("s", 1.5, "a time lies outside 0 to 1"),
        ("k", -1, "a time lies outside 0 to 1"),
    ],
)
def test_impossible_numbers_are_reported_with_their_record(cache, four, capsys, name, value, words):
    four[2] = with_value(four[2], name, value)
    forge(cache, members(four))
    assert words in verify_output(cache, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: replace(record, cond=record.cond[:5]),
        lambda record: replace(record, features=BlockFeatures({"mid": record.features.by_block["mid"]})),
        lambda record: replace(record, features=BlockFeatures(dict(reversed(record.features.by_block.items())))),
        lambda record: replace(record, features=BlockFeatures(
            {**record.features.by_block, "mid": record.features.by_block["mid"][:, :7]})),
    ],
)  # fmt: skip
def test_a_record_of_other_shapes_or_blocks_is_reported(cache, four, capsys, change):
    four[3] = change(four[3])
    forge(cache, members(four))
    assert "record 000000000 of data/train-000000.tar has" in verify_output(cache, capsys)


def test_bytes_behind_the_last_record_are_reported(cache, four, capsys):
    header = (cache / TRAIN).read_bytes()[:512]
    forge(cache, members(four), b"\0" * 512 + header)
    assert "something lies behind its last record" in verify_output(cache, capsys)


def test_an_unlisted_tar_is_reported(cache, capsys):
    (cache / "data/train-000007.tar").write_bytes((cache / TRAIN).read_bytes())
    assert "train-000007.tar: is not in the manifest" in verify_output(cache, capsys)


def test_a_shard_missing_at_the_end_of_a_finished_cache_is_reported(cache, capsys):
    (cache / "COMPLETE").write_text("9\n")
    assert main(["verify", str(cache)]) == 0
    (cache / "data/train-000001.tar").unlink()
    reseal_manifest(cache, Manifest.open(cache).without_shard("data/train-000001.tar"))
    assert "COMPLETE: 9 prompts were finished, now 6 are" in verify_output(cache, capsys)


def test_a_failure_of_a_missing_shard_is_reported(cache, capsys):
    manifest = Manifest.open(cache)
    failure = Failure(file="data/train-000009.tar", key="000000040", reason="none")
    reseal_manifest(cache, manifest.model_copy(update={"failures": (failure,)}))
    assert "train-000009.tar: the manifest tells why 000000040 failed" in verify_output(cache, capsys)


def edit_table(cache: Path, change: Callable[[zarr.Group], None]) -> None:
    """A table that was changed after it was made, and a manifest with its new hashes."""
    write_table(cache)
    group = zarr.open_group(cache / "table.zarr", mode="r+")
    change(group)
    manifest = Manifest.open(cache)
    manifest.model_copy(update={"table": table_files(cache)}).save(cache)


def change_one_value(group: zarr.Group, name: str) -> None:
    values = group[name][:]
    values[5] += 1
    group[name][:] = values


@pytest.mark.parametrize("name", ["key", "split", "draw", "k", "s", "class", "feature_mid", "feature_down_0"])
def test_a_table_that_differs_is_reported_with_the_record(cache, capsys, name):
    edit_table(cache, lambda group: change_one_value(group, name))
    assert f"the table has another {name}, first in record 000000002" in verify_output(cache, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda group: group.create_array("extra", data=torch.zeros(18).numpy()),
            "extra/zarr.json: should not be there",
        ),
        (lambda group: group.__delitem__("k"), "table.zarr/k/zarr.json: should be there"),
        (lambda group: group.attrs.update({"blocks": ["mid"]}), "feature_down_0/zarr.json: should not be there"),
        (lambda group: group.attrs.update({"class_names": ["shape/disc"]}), "is not in the table"),
        (lambda group: group.attrs.update({"shards_sha256": "0" * 64}), "was made from other shards"),
    ],
)
def test_a_table_of_other_columns_or_names_is_reported(cache, capsys, change, words):
    edit_table(cache, change)
    assert words in verify_output(cache, capsys)


def test_a_changed_digit_of_the_journal_is_reported(cache, capsys, make_recipe):
    path = cache / "journal/train-000000.json"
    content = path.read_text()
    path.write_text(content.replace('"records": 4', '"records": 5'))
    assert "journal/train-000000.json: sha256 of its first" in verify_output(cache, capsys)
    path.write_text(
        append_seal(content.replace('"first_key": "000000000"', '"first_key": "000000001"').rpartition('"sha256"')[0])
    )
    assert "journal/train-000000.json: has another shard than the manifest" in verify_output(cache, capsys)
    path.rename(cache / "journal/train-000005.json")
    output = verify_output(cache, capsys)
    assert "journal/train-000000.json: " in output
    assert "journal/train-000005.json: the manifest does not know its shard" in output


def test_a_cache_without_a_journal_is_whole(cache, tmp_path):
    (cache / "journal").rename(tmp_path / "journal")
    assert main(["verify", str(cache)]) == 0
