"""What other loaders need beside the shards, so that a cache can be published as it lies.

Megatron-Energon's `.nv-meta` is left out: its index is a database whose making belongs to `energon prepare`, which
takes these tars as they are.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from configs.atomic import atomic_write
from configs.refusal import Refused
from shards.card import MARK, card
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import SPLITS, Split

CARD = "README.md"


def export_index(cache: Path, license_id: str, name: str) -> list[Path]:
    """Write README.md and a list of shards for each split into a cache; returns the files.

    Raises `Refused` rather than write over a README.md of somebody else.
    """
    target = cache / CARD
    if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise Refused(f"{target}: was not written by this command - move it away, then run the command again")
    manifest = Manifest.open(cache)
    first = next((split for split in SPLITS if manifest.of(split)), None)
    if first is None:
        raise Refused(f"{cache}: holds no record yet - run its make target first")
    written = dict(_lists(manifest, name))
    written[CARD] = str(card(Reader(cache, first), license_id, name))
    for file, content in written.items():
        atomic_write(cache / file, content)
    return [cache / file for file in written]


def _lists(manifest: Manifest, name: str) -> Iterator[tuple[str, str]]:
    for split in SPLITS:
        if manifest.of(split):
            yield f"wids-{split}.json", json.dumps(shard_list(manifest, split, name), indent=1) + "\n"


def shard_list(manifest: Manifest, split: Split, name: str) -> dict[str, object]:
    """A split's shards with their counts, in the form that `wids` reads for random access."""
    shards = manifest.of(split)
    return {
        "wids_version": 1,
        "name": f"{name}-{split}",
        "length": sum(shard.records for shard in shards),
        "shardlist": [
            {"url": shard.file, "nsamples": shard.records, "filesize": shard.bytes, "dataset": split}
            for shard in shards
        ],
    }
