"""`python -m shards verify|show|stats|export-index FOLDER`, which is `sollune shards ...` too."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.characters import escaped
from configs.ending import ended
from configs.parser import Parser
from configs.terminal import prepare
from configs.values import place

if TYPE_CHECKING:
    from shards.record import Record

DAMAGED = 1
UNLICENSED = "unknown"


def verify(words: argparse.Namespace) -> int:
    """Check every file against the manifest, every record against the schema, and the table against the shards."""
    from shards.damage import Damaged, way_out
    from shards.inspection import inspect
    from shards.manifest import Manifest, find_cache
    from shards.record import SPLITS

    folder = find_cache(words.folder)
    try:
        found = Manifest.open(folder)
    except Damaged as damage:
        print(f"sollune: {damage}", file=sys.stderr)
        return DAMAGED
    faults = 0
    for fault in inspect(folder, found):
        faults += 1
        way = "" if " - " in fault.what else f" - {way_out(folder)}"
        print(f"sollune: {escaped(fault.told(folder))}{way}", file=sys.stderr)
    if faults:
        return DAMAGED
    for split in SPLITS:
        shards = found.of(split)
        records, draws = sum(shard.records for shard in shards), sum(shard.draws for shard in shards)
        print(
            f"{split}: {len(shards)} shards, {records} records, {draws} draws, {sum(s.bytes for s in shards):,} bytes"
        )
    if found.failures:
        print(f"{len(found.failures)} prompts gave no record (see stats)")
    print("ok")
    return 0


def show(words: argparse.Namespace) -> None:
    """Print one record: its words, and shape, type, mean and deviation of its tensors."""
    print("\n".join(described(asked(words))))


def asked(words: argparse.Namespace) -> "Record":
    """The record that is meant: the one of this key, or the first of its split."""
    from shards.reader import Reader

    reader = Reader(words.folder, words.split)
    return reader.record(words.key) if words.key else next(reader.records())


def described(record: "Record") -> Iterator[str]:
    """A record as lines of text."""
    from shards.stats import parts

    for name in ("key", "text", "class_name", "seed", "guidance_scale"):
        yield f"{name:<16}{escaped(str(getattr(record, name)))}"
    named = {name: values[0] for name, values in parts(record).items() if len(values) == 1}
    named |= {f"features.{block}": values for block, values in record.features.by_block.items()}
    for name, values in named.items():
        kind = str(values.dtype).removeprefix("torch.")
        wide = values.double()
        spread = f"mean {wide.mean():+.4f}  std {wide.std(correction=0):.4f}"
        yield f"{name:<16}{list(values.shape)!s:<18}{kind:<10}{spread}"
    for i, (k, s, walked) in enumerate(zip(*(getattr(record.draws, n) for n in ("k", "s", "trajectory")), strict=True)):
        yield f"draw {i:<11}k {int(k):>3}  s {float(s):.6f}  {'trajectory' if walked else 'noised again'}"


def stats(words: argparse.Namespace) -> None:
    """Print how much there is, at which times, of which classes, and how fast the velocities are."""
    from shards.reader import Reader
    from shards.stats import report, stats_of

    reader = Reader(words.folder)
    print("\n".join(report(reader, stats_of(reader))))


def export_index(words: argparse.Namespace) -> None:
    """Write a dataset card and lists of the shards into a cache, for datasets, webdataset, wids and the hub."""
    from shards.manifest import Manifest, find_cache
    from shards.publish import export_index

    cache: Path = find_cache(words.folder)
    whole = cache.absolute()
    name = words.name or f"sollune cache {(whole.parent if whole.name == 'cache' else whole).name}"
    for path in export_index(cache, words.license, name):
        print(f"{path}: written")
    if words.license == UNLICENSED:
        print(f"its license is {UNLICENSED} - say --license before you publish it")
    told = Manifest.open(cache).recipe.information
    places = " and ".join(str(told[name]) for name in ("teacher_location", "teacher_path") if told.get(name))
    print(f"the card names no path of this machine; manifest.json says that the teacher lay at {places or None}")
    print("for Megatron-Energon run energon prepare on the folder: it takes the tars as they are")


def one_record(words: argparse.ArgumentParser) -> None:
    """The words of `show`."""
    words.add_argument("key", nargs="?", metavar="KEY", help="nine digits; the first record unless given")
    words.add_argument("--split", choices=("train", "validation"), default="train", help="(default: train)")


def card_facts(words: argparse.ArgumentParser) -> None:
    """The words of `export-index`."""
    words.add_argument("--license", default=UNLICENSED, metavar="ID", help=f"as the hub spells it ({UNLICENSED})")
    words.add_argument("--name", metavar="TEXT", help="title of the card (sollune cache, and the run folder's name)")


class Command(NamedTuple):
    """What runs, and what else it may be told beside the folder."""

    run: Callable[[argparse.Namespace], int | None]
    declare: Callable[[argparse.ArgumentParser], None] = lambda words: None


COMMANDS: Mapping[str, Command] = {
    "verify": Command(verify),
    "show": Command(show, one_record),
    "stats": Command(stats),
    "export-index": Command(export_index, card_facts),
}


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run one command; raises `Refused` for bad input."""
    parser = Parser(prog="sollune shards", description="Look into a cache.", allow_abbrev=False)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, command in commands.items():
        meaning = command.run.__doc__
        words = parsers.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        words.add_argument(
            "folder", type=place, metavar="FOLDER", help="cache folder, or a run folder with a cache in it"
        )
        command.declare(words)
    parsed = parser.parse_args(argv)
    return commands[parsed.command].run(parsed) or 0


if __name__ == "__main__":
    prepare()
    sys.exit(ended(main, sys.argv[1:]))
