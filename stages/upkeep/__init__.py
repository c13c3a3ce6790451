"""`sollune shards ...`: the commands over a cache, with those that need its teacher or the story which made it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs.disk import refuse_unwritable
from configs.refusal import Refused
from configs.values import location, place
from shards import __main__ as shards
from shards.journal import NAME as JOURNAL
from shards.journal import restore_entries
from shards.manifest import Manifest, find_cache
from shards.quarantine import quarantine
from stages.upkeep.made import made

SAMPLE = 20


def verify(words: argparse.Namespace) -> int:
    """Check every file, record and row of the table; with --deep ask the teacher again about a sample of records."""
    if not words.deep:
        return shards.verify(words)
    from stages.upkeep.deep import audit, device_of  # here, because it takes seconds and most commands do without

    device = device_of(words.device)  # refused before all of the cache is read
    return shards.verify(words) or audit(words, device)


def repair(words: argparse.Namespace) -> int:
    """Move damaged files aside and make exactly those again, as the configuration beside the cache says."""
    cache: Path = find_cache(words.folder)
    origin = made(cache, words.teacher)
    moved = quarantine(cache)
    for path in moved:
        print(f"moved aside: {path}")
    for path in restored(cache):
        print(f"written again: {path}")
    if any(path.parent.name != JOURNAL for path in moved) or shards.verify(words):
        origin.again()
    return shards.verify(words)


def restored(cache: Path) -> list[Path]:
    """The entries of the journal that were missing; none are written where no manifest vouches for them."""
    try:
        return restore_entries(cache, Manifest.open(cache))
    except Refused:
        return []


def show(words: argparse.Namespace) -> None:
    """Print one record, and draw its picture with the teacher's decoder."""
    if words.picture and not words.no_picture:
        refuse_unwritable(words.picture)
    record = shards.asked(words)
    print("\n".join(shards.described(record)))
    if words.no_picture:
        return
    from stages.upkeep.picture import draw

    path = words.picture or Path(f"{words.split}-{record.key}.png")
    try:
        draw(record, words.teacher or made(find_cache(words.folder)).lies_at(), path)
    except Refused as refusal:
        print(f"no picture: {refusal}")
    else:
        print(f"picture: {path}")


def deeper(words: argparse.ArgumentParser) -> None:
    """The words of `verify`."""
    words.add_argument("--deep", action="store_true", help="ask the teacher again about a sample of records")
    words.add_argument("--sample", type=some, default=SAMPLE, metavar="N", help=f"records of the sample ({SAMPLE})")
    words.add_argument("--seed", type=int, default=0, metavar="S", help="which sample (0)")
    words.add_argument("--device", default="auto", metavar="NAME", help="torch device (auto: a GPU where there is one)")
    moved(words)


def some(word: str) -> int:
    """A number of records, one or more."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} should be 1 or more")
    return int(word)


def moved(words: argparse.ArgumentParser) -> None:
    """Where the teacher lies."""
    words.add_argument(
        "--teacher", type=location, metavar="FOLDER", help="where it lies (as the configuration beside the cache says)"
    )


def drawn(words: argparse.ArgumentParser) -> None:
    """The words of `show`."""
    shards.one_record(words)
    moved(words)
    words.add_argument("--picture", type=place, metavar="FILE.png", help="where to draw it (SPLIT-KEY.png, right here)")
    words.add_argument("--no-picture", action="store_true", help="print only")


COMMANDS = {
    **shards.COMMANDS,
    "verify": shards.Command(verify, deeper),
    "repair": shards.Command(repair, moved),
    "show": shards.Command(show, drawn),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; raises `Refused` for bad input."""
    return shards.main(argv, COMMANDS)
