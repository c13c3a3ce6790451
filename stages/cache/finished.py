"""A cache that another machine has finished: its table is taken from the store, and not made again."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.integrity import Damaged
from shards.manifest import MANIFEST_FILE, Manifest
from shards.table import is_tabulated
from shards.table_check import TABLE_FOLDER
from shards.verify import COMPLETE_FILE
from stages.system.refusal import Refused
from stages.system.storage.local_copy import fetch_synced
from stages.system.storage.locations import location_of
from stages.system.storage.object_store import store_of

CACHE_CONFIG = "cache.yaml"
THREADS = 8


def take_finished(run: Path, manifest: Manifest, prompts: int) -> bool:
    """Take table, `cache.yaml`, manifest and `COMPLETE` of a run from its store, in the place of what is here.

    False where the store has no finished cache of exactly these shards, failures and prompts, with a sound table; what
    is missing is made here then. Nothing is taken for a run of this machine.
    """
    location = location_of(run)
    if location is None:
        return False
    cache, store, there = run / "cache", store_of(location), location / "cache"
    if store.read(there / COMPLETE_FILE) != complete_text(prompts).encode():
        return False
    try:
        finished = Manifest.parse(store.read(there / MANIFEST_FILE) or b"", cache)
    except Refused:
        return False
    if not finished.table or not same_shards(finished, manifest):
        return False
    try:
        files = [entry.file for entry in finished.table if not (cache / entry.file).exists() or entry.fault(cache)]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="storage") as pool:
            list(pool.map(lambda file: fetch_synced(store, there / file, cache / file), files))
        if any(entry.fault(cache) for entry in finished.table):
            return False
        fetch_synced(store, there / MANIFEST_FILE, cache / MANIFEST_FILE)
        fetch_synced(store, location / CACHE_CONFIG, run / CACHE_CONFIG)
        fetch_synced(store, there / COMPLETE_FILE, cache / COMPLETE_FILE)
    except (FileNotFoundError, Damaged):  # another command removes it
        return False
    named = {entry.file for entry in finished.table}
    for path in (cache / TABLE_FOLDER).rglob("*"):
        if path.is_file() and path.relative_to(cache).as_posix() not in named:
            path.unlink(missing_ok=True)
    return is_finished(cache, manifest)


def is_finished(cache: Path, manifest: Manifest) -> bool:
    """Whether the manifest here names the shards and failures of this one, and the table that is here."""
    try:
        here = Manifest.open(cache)
    except Refused:
        return False
    return same_shards(here, manifest) and is_tabulated(cache)


def same_shards(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests name the same content, with a table or without."""
    return (one.recipe.fingerprint(), one.shards, one.failures) == (
        other.recipe.fingerprint(),
        other.shards,
        other.failures,
    )


def complete_text(prompts: int) -> str:
    """The content of `COMPLETE`."""
    return f"{prompts}\n"
