"""No bit of a cache changes unseen: `verify` finds it, and so does training, before the record is used."""

import random
import shutil
from pathlib import Path

import pytest

from shards.__main__ import main
from shards.integrity import Damaged
from shards.reader import Reader
from shards.record import SPLITS
from shards.table import Table, write_table
from stages.system.refusal import Refused

FLIPS, CUTS = 200, 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_module_cache):
    cache = make_module_cache(tmp_path_factory.mktemp("whole") / "cache")
    write_table(cache)
    return cache


def read_training_batches(cache: Path) -> None:
    """Read whatever training reads: every row of both splits and every column of the table."""
    for split in SPLITS:
        reader = Reader(cache, split, batch_size=1)
        for _, _batch in zip(range(reader.samples_per_epoch), reader.batches(), strict=False):
            pass
    table = Table.open(cache)
    for name in (
        "key",
        "draw",
        "k",
        "s",
        "split",
        "class",
        "width",
        "height",
        *(f"feature_{block}" for block in table.blocks),
    ):
        table.column(name)


def damage_cases(cache: Path) -> list[tuple[str, int, bool]]:
    """(file, bit, whether it is cut there): every kind of file is met as often as any other."""
    rng, cases = random.Random(0), []
    files = sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    parts = (".tar", "manifest.json", "zarr.json", "/c/", "journal/")
    kinds = [[file for file in files if part in file] for part in parts]
    assert all(kinds)
    for number in range(FLIPS + CUTS):
        file = rng.choice(kinds[number % len(kinds)])
        cases.append((file, rng.randrange(8 * (cache / file).stat().st_size), number >= FLIPS))
    return cases


def test_every_flipped_bit_and_every_cut_is_found_by_verify_and_by_training(whole, capsys):
    assert main(["verify", str(whole)]) == 0
    read_training_batches(whole)
    unseen = []
    for file, bit, cut in damage_cases(whole):
        good = (whole / file).read_bytes()
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (whole / file).write_bytes(good[: bit // 8] if cut else bad)
        try:
            verified = main(["verify", str(whole)])
        except Refused:
            verified = 2
        if verified == 0:
            unseen.append(("verify", file, bit, cut))
        if not file.startswith("journal/"):  # training does not read it
            with pytest.raises(Refused):
                read_training_batches(whole)
        (whole / file).write_bytes(good)
    assert unseen == []
    assert main(["verify", str(whole)]) == 0


def test_a_file_that_the_manifest_does_not_list_is_found_in_the_table(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "table.zarr" / "extra").write_text("x")
    with pytest.raises(Damaged, match="extra: is not in the manifest"):
        Table.open(copy)
