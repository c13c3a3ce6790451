"""Caches of the small records of tests/shards."""

import importlib.util
from pathlib import Path

from shards.writer import CacheWriter

_SPEC = importlib.util.spec_from_file_location("small_records", Path(__file__).parents[1] / "shards" / "conftest.py")
assert _SPEC is not None
assert _SPEC.loader is not None
_RECORDS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_RECORDS)
make_numbered_record, make_small_recipe = _RECORDS.make_numbered_record, _RECORDS.make_small_recipe


def cache_in(folder: Path, shards: int, records: int = 4) -> Path:
    """A cache of so many training shards of `records` small records each."""
    writer = CacheWriter(folder, make_small_recipe())
    for index in range(shards):
        numbers = range(index * records, (index + 1) * records)
        writer.add("train", index, (make_numbered_record(number) for number in numbers))
    return folder
