"""What a cache leaves out, and what lies in it that nobody vouches for."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from shards.damage import Damaged, Fault, read_bounded
from shards.entries import Failure, Shard
from shards.manifest import Manifest
from shards.record import SPLITS

COMPLETE = "COMPLETE"
MOST_DIGITS = 20


def gaps(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each shard and key that is missing or that nobody named; a prompt that failed is not missing."""
    for split in SPLITS:
        yield from _in_split(manifest.of(split), f"data/{split}", manifest.failures)
    known = {shard.file for shard in manifest.shards}
    for failure in manifest.failures:
        if failure.file not in known:
            yield Fault(failure.file, f"the manifest tells why {failure.key} failed, and does not name the shard")
    for path in sorted((folder / "data").glob("*.tar")):
        file = f"data/{path.name}"
        if file not in known:
            yield Fault(file, "is not in the manifest, and plain readers would read it")
    yield from _complete(folder, manifest)


def _in_split(shards: tuple[Shard, ...], name: str, failures: tuple[Failure, ...]) -> Iterator[Fault]:
    follows: int | None = None
    for number, shard in enumerate(shards):
        if shard.file != f"{name}-{number:06d}.tar":
            yield Fault(f"{name}-{number:06d}.tar", f"missing: {shard.file} is there - make the cache whole")
            return
        keys = [int(one.key) for one in failures if one.file == shard.file]
        low, high = min([int(shard.first_key), *keys]), max([int(shard.last_key), *keys])
        if follows is not None and low != follows:
            yield Fault(shard.file, f"keys {low:09d} on, {follows:09d} should be next", f"{low:09d}")
        if high - low + 1 != shard.records + len(keys):
            yield Fault(shard.file, f"{high - low + 1} keys lie between its ends, {shard.records} records are there")
        follows = high + 1


def _complete(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Whether a cache that was finished once still answers for as many prompts."""
    try:
        said = read_bounded(folder / COMPLETE, MOST_DIGITS).strip()
    except FileNotFoundError:
        return
    except (Damaged, OSError) as error:
        yield Fault(COMPLETE, str(error))
        return
    answers = sum(shard.records for shard in manifest.shards) + len(manifest.failures)
    if not said.isdigit():
        yield Fault(COMPLETE, f"says {said!r}, should say how many prompts there are")
    elif answers < int(said):
        last = [shard.file for shard in chain.from_iterable(manifest.of(split)[-1:] for split in SPLITS)]
        yield Fault(
            COMPLETE, f"{said.decode()} prompts were answered for, now {answers} are; the last shards are {last}"
        )
