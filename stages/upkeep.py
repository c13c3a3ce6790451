"""`sollune shards ...`: the commands over a cache, with those that need the story which made it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs.load import load
from configs.refusal import Refused
from shards import __main__ as shards
from shards.manifest import find_cache
from shards.quarantine import quarantine


def repair(words: argparse.Namespace) -> int:
    """Move damaged files aside and make exactly those again, as the configuration beside the cache says."""
    cache: Path = find_cache(words.folder)
    config = cache.parent / "cache.yaml"
    if not config.is_file():
        raise Refused(
            f"{config}: not there, so nothing says how {cache} was made - run its make target, or fetch it again"
        )
    moved = quarantine(cache)
    for path in moved:
        print(f"moved aside: {path}")
    if moved or shards.verify(words):
        from stages import cache_teacher  # here, because it takes seconds and most commands do without

        cache_teacher.run(load(cache_teacher.Config, "cache_teacher", [config], ["--run", str(cache.parent)]))
    return int(shards.verify(words))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; raises `Refused` for bad input."""
    return shards.main(argv, {**shards.COMMANDS, "repair": repair})
