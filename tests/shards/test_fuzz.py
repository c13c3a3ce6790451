"""Laws of an untrusted cache: each outcome is a correct reading, or one refusal that names the file or the record.

Hypothesis looks for the seed, or the bytes, that break them; `benchmarks.fuzz` does so for a hundred thousand cases.
"""

import os
import struct
import tracemalloc
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import forge, fuzz_cases
from shards.archive import record_spans
from shards.codec import decode, decode_metadata, encode
from shards.integrity import Damaged
from shards.journal import ShardJournal
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import MAX_HEADER_BYTES, parse_layout
from shards.table import Table
from stages.system.refusal import Refused

FEW, MANY = (
    settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    for count in (15, 60)
)
METADATA, TENSORS = encode(forge.record(0))
LENGTH = int.from_bytes(TENSORS[:8], "little")
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return fuzz_cases.FuzzCache(tmp_path_factory.mktemp("hostile"))


def pieces(good):
    """Any bytes, and any bytes put into good ones."""
    cut = st.tuples(st.integers(0, len(good)), st.integers(0, len(good)), st.binary(max_size=64))
    return st.binary(max_size=400) | cut.map(lambda c: good[: min(c[:2])] + c[2] + good[max(c[:2]) :])


@MANY
@given(metadata=pieces(METADATA), tensors=pieces(TENSORS))
def test_bytes_are_a_record_that_is_stored_in_these_bytes_or_none(metadata, tensors):
    for pair in ((metadata, TENSORS), (METADATA, tensors), (metadata, tensors)):
        no, record = fuzz_cases.catch_refusal(lambda pair=pair: decode(*pair), "record")
        assert no or encode(record) == pair


@MANY
@given(metadata=pieces(METADATA), header=pieces(TENSORS[8 : 8 + LENGTH]))
def test_metadata_and_header_of_a_record_are_checked_like_the_whole(metadata, header):
    no, fields = fuzz_cases.catch_refusal(lambda: decode_metadata(metadata), "record")
    assert no or fields["key"] == decode(metadata, TENSORS).key
    try:
        assert parse_layout(header, ("mid", "up_0")).states == 2
        assert header == TENSORS[8 : 8 + LENGTH]
    except ValueError:
        pass


@MANY
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_bytes_are_no_manifest_unless_one_was_saved(tmp_path, content):
    with pytest.raises(Refused, match=r"manifest\.json"):
        Manifest.parse(content, tmp_path)


@MANY
@given(content=st.binary(max_size=2000))
def test_bytes_are_no_tar_with_records(tmp_path, content):
    (tmp_path / "odd.tar").write_bytes(content)
    assert record_spans(tmp_path / "odd.tar") == {}


@pytest.fixture(scope="module")
def sized_world(tmp_path_factory):
    return fuzz_cases.FuzzCache(tmp_path_factory.mktemp("sized"), several_sizes=True)


@FEW
@pytest.mark.parametrize("kind", fuzz_cases.KINDS)
@given(seed=SEEDS)
def test_a_hostile_cache_is_read_as_it_is_or_refused(world, sized_world, kind, seed):
    for cache in (world, sized_world):
        assert fuzz_cases.KINDS[kind][0](Random(seed), cache)


@pytest.mark.parametrize("kind", ["record, forged", "shard, forged", "table, forged"])
def test_forging_gives_caches_that_are_read_and_caches_that_are_refused(world, kind):
    outcomes = {fuzz_cases.KINDS[kind][0](Random(seed), world) for seed in range(40)}
    assert {fuzz_cases.FORGED, fuzz_cases.REFUSED} <= outcomes


def peak_bytes(action):
    """The most memory that an act takes at a time; it must be refused, unless it returns something."""
    tracemalloc.start()
    try:
        return action(), tracemalloc.get_traced_memory()[1]
    except Refused:
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_record_is_read_in_its_own_size(tmp_path, make_recipe):
    large = forge.record(0, (4, 200, 200))
    fuzz_cases.forge.CacheWriter(tmp_path, make_recipe()).add("train", 0, [large])
    reader, size = Reader(tmp_path), sum(map(len, encode(large)))
    assert reader.record_at(0).x0.equal(large.x0)  # verified and open
    record, taken = peak_bytes(lambda: reader.record_at(0))
    assert record.states.x_s.equal(large.states.x_s)
    assert size <= taken < 1.1 * size


@pytest.mark.parametrize("claim", [2**20, 2**31, 2**62, 2**64 - 1])
def test_a_header_that_claims_much_takes_nothing(claim):
    header = TENSORS[8 : 8 + LENGTH]
    hostile = [struct.pack("<Q", claim) + TENSORS[8:]]
    for old, new in ((b'"shape":[1,2,2]', b'"shape":[1,2,%d]'), (b"[0,16]", b"[0,%d]")):
        changed = header.replace(old, new % claim)
        assert changed != header
        changed = changed.rstrip() + b" " * (-len(changed.rstrip()) % 8)
        hostile.append(struct.pack("<Q", len(changed)) + changed + TENSORS[8 + LENGTH :])
    for tensors in hostile:
        record, taken = peak_bytes(lambda tensors=tensors: decode(METADATA, tensors))
        assert record is None
        assert taken < 4 * MAX_HEADER_BYTES


@pytest.mark.parametrize(
    "frames",
    [
        {0: forge.BOMB},
        {0: forge.bomb(8192) + forge.BOMB},
        {0: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 10**10) + forge.bomb(8192)[13:]},
    ],
    ids=["bomb", "bomb behind a good frame", "ten gigabytes claimed"],
)
def test_a_chunk_that_would_unpack_to_more_takes_nothing(world, frames):
    file, tree = "table.zarr/k/c/0", {**world.manifest, "table": [dict(part) for part in world.manifest["table"]]}
    content = forge.pack_chunks(frames, 16)
    for part in tree["table"]:
        if part["file"] == file:
            part["bytes"], part["sha256"] = len(content), forge.hashlib.sha256(content).hexdigest()
    with world.replace_files({file: content, "manifest.json": world.manifest_bytes(tree)}):
        table = Table.open(world.cache)
        values, taken = peak_bytes(lambda: table.column("k"))
        assert values is None
        assert taken < 4 << 20
        with pytest.raises(Damaged, match=r"k/c/0: chunk 0 at byte 0"):
            table.column("k")


def test_a_description_inside_another_one_is_refused(world):
    """zarr would take an array's description from its group's, where codecs would not be checked and sizes."""
    inner = forge.json.loads(world.files["table.zarr/k/zarr.json"]) | {"shape": [10**12], "codecs": [{"name": "bytes"}]}
    group = forge.json.loads(world.files["table.zarr/zarr.json"])
    group["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {"k": inner}}
    _with_description(world, "table.zarr/zarr.json", group, r"zarr\.json: describes no group, or more than one")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codecs": [{"name": "bytes"}, {"name": "gzip"}]}, "describes no array"),
        ({"shape": [10**12]}, "the shards have 10 states"),
        ({"shape": [0]}, "has a size of 0"),
        ({"shape": [True]}, "has a size of True"),
        ({"fill_value": 7}, "in another way than is accepted"),
        ({"data_type": "float64"}, "in another way than is accepted"),
        ({"storage_transformers": [{"name": "x"}]}, "in another way than is accepted"),
        ({"chunk_key_encoding": {"name": "v2"}}, "in another way than is accepted"),
    ],
)
def test_an_array_is_described_in_one_way_only(world, change, words):
    description = forge.json.loads(world.files["table.zarr/k/zarr.json"]) | change
    _with_description(world, "table.zarr/k/zarr.json", description, rf"k/zarr\.json: .*{words}")


def _with_description(world, file, description, words):
    content = forge.json.dumps(description, indent=2).encode()
    tree = {**world.manifest, "table": [dict(part) for part in world.manifest["table"]]}
    for part in tree["table"]:
        if part["file"] == file:
            part["bytes"], part["sha256"] = len(content), forge.hashlib.sha256(content).hexdigest()
    forged = {file: content, "manifest.json": world.manifest_bytes(tree)}
    with world.replace_files(forged), pytest.raises(Damaged, match=words):
        Table.open(world.cache)


@pytest.mark.parametrize("states", [1, 2**40])
def test_states_that_the_records_lack_are_refused_before_allocation(world, states):
    tree = {**world.manifest, "shards": [dict(shard) for shard in world.manifest["shards"]]}
    tree["shards"][0]["draws"] = 2 * states
    with world.replace_files({"manifest.json": world.manifest_bytes(tree)}):
        for budget in (1 << 30, 0):
            _, taken = peak_bytes(lambda budget=budget: _refused_batch(world, budget))
            assert taken < 1 << 20


def _refused_batch(world, budget):
    with pytest.raises(Damaged, match=r"train-000000\.tar: .*states"):
        Reader(world.cache, memory_budget_bytes=budget, workers=0).batch(np.arange(12))


@pytest.mark.parametrize(
    ("other", "words"), [((1, 1, 1), "has size 8x8, manifest says 16x16"), ((2, 2, 2), "has x0, x_t.* unlike")]
)
def test_rows_are_not_spread_over_a_record_of_another_shape(world, other, words):
    """A tensor of one row would be broadcast to every row of a batch, unless shapes are checked."""
    members = [(f"{n:09d}", encode(forge.record(n, shape))) for n, shape in ((0, (1, 2, 2)), (1, other))]
    listed = [
        (f"{key}.{kind}", body)
        for key, pair in members
        for kind, body in zip(("json", "safetensors"), pair, strict=True)
    ]
    tar, starts = forge.forge_tar(None, listed)
    tree = {**world.manifest, "shards": list(world.manifest["shards"])}
    tree["shards"][0] = forge.forge_entry(tree["shards"][0], tar, starts, listed)
    with world.replace_files({"data/train-000000.tar": tar, "manifest.json": world.manifest_bytes(tree)}):
        for budget in (1 << 30, 0):
            with pytest.raises(Damaged, match=rf"record at byte \d+: record .* {words}"):
                Reader(world.cache, memory_budget_bytes=budget, workers=0).batch(np.arange(8))


def test_blocks_in_another_order_are_refused(world):
    """Code that iterates over a batch's features would confuse the blocks."""
    records = [encode(forge.record(0)), encode(forge.record(1, blocks=("up_0", "mid")))]
    listed = [
        (f"{n:09d}.{kind}", pair[i]) for n, pair in enumerate(records) for i, kind in enumerate(("json", "safetensors"))
    ]
    tar, starts = forge.forge_tar(None, listed)
    tree = {**world.manifest, "shards": list(world.manifest["shards"])}
    tree["shards"][0] = forge.forge_entry(tree["shards"][0], tar, starts, listed)
    with world.replace_files({"data/train-000000.tar": tar, "manifest.json": world.manifest_bytes(tree)}):
        for budget in (1 << 30, 0):
            with pytest.raises(Damaged, match="has blocks unlike the records before it"):
                Reader(world.cache, memory_budget_bytes=budget, workers=0).batch(np.arange(8))


@pytest.mark.parametrize("odd", ["pipe", "endless", "dangling"])
def test_a_journal_entry_that_is_no_file_is_not_waited_for(world, odd):
    """What is not in the journal is not finished: it would be made again, and its entry replaced."""
    file, fingerprint = "journal/train-000000.json", Manifest.open(world.cache).recipe.fingerprint()
    with world.replace_files({file: None}):
        if odd == "pipe":
            os.mkfifo(world.cache / file)
        else:
            (world.cache / file).symlink_to("/dev/zero" if odd == "endless" else "/nowhere")
        entries = ShardJournal(world.cache, fingerprint).entries()
    assert sorted(entries) == ["data/train-000001.tar", "data/validation-000000.tar"]


@pytest.mark.parametrize("odd", ["pipe", "endless", "huge"])
def test_a_manifest_that_is_no_file_is_not_waited_for(world, odd):
    path = world.cache / "manifest.json"
    with world.replace_files({"manifest.json": None}):
        if odd == "pipe":
            os.mkfifo(path)
        elif odd == "endless":
            path.symlink_to("/dev/zero")
        else:
            path.touch()
            os.truncate(path, 1 << 40)
        manifest, taken = peak_bytes(lambda: Manifest.open(world.cache))
    assert manifest is None
    assert taken < 1 << 20
