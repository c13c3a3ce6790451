"""`python -m shards verify|show|stats|export-index FOLDER`, which is `sollune shards ...` too."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.values import path_argument
from stages.system.ending import run_to_exit_code
from stages.system.refusal import Parser, escape_unprintable
from stages.system.terminal import prepare_streams

if TYPE_CHECKING:
    from shards.record import Record

EXIT_DAMAGED = 1
UNKNOWN_LICENSE = "unknown"


def verify(args: argparse.Namespace) -> int:
    """Check every file against the manifest, every record against the schema, and the table against the shards."""
    from shards.integrity import Damaged, repair_hint
    from shards.manifest import Manifest, find_cache
    from shards.record import SPLITS
    from shards.verify import inspect

    folder = find_cache(args.folder)
    try:
        found = Manifest.open(folder)
    except Damaged as damage:
        print(f"sollune: {damage}", file=sys.stderr)
        return EXIT_DAMAGED
    faults = 0
    for fault in inspect(folder, found):
        faults += 1
        way = "" if " - " in fault.reason else f" - {repair_hint(folder)}"
        print(f"sollune: {escape_unprintable(fault.message(folder))}{way}", file=sys.stderr)
    if faults:
        return EXIT_DAMAGED
    for split in SPLITS:
        shards = found.shards_of(split)
        records, draws = sum(shard.records for shard in shards), sum(shard.draws for shard in shards)
        print(
            f"{split}: {len(shards)} shards, {records} records, {draws} draws, {sum(s.bytes for s in shards):,} bytes"
        )
    if found.failures:
        print(f"{len(found.failures)} prompts gave no record (see stats)")
    print("ok")
    return 0


def show(args: argparse.Namespace) -> None:
    """Print one record: its words, and shape, type, mean and deviation of its tensors."""
    print("\n".join(record_lines(selected_record(args))))


def selected_record(args: argparse.Namespace) -> "Record":
    """The record that is meant: the one of this key, or the first of its split."""
    from shards.reader import Reader

    reader = Reader(args.folder, args.split)
    return reader.record(args.key) if args.key else next(reader.records())


def record_lines(record: "Record") -> Iterator[str]:
    """A record as lines of text."""
    from shards.stats import tensors_by_purpose

    for name in ("key", "text", "class_name", "seed", "guidance_scale"):
        yield f"{name:<16}{escape_unprintable(str(getattr(record, name)))}"
    named = {name: values[0] for name, values in tensors_by_purpose(record).items() if len(values) == 1}
    named |= {f"features.{block}": values for block, values in record.features.by_block.items()}
    for name, values in named.items():
        kind = str(values.dtype).removeprefix("torch.")
        wide = values.double()
        spread = f"mean {wide.mean():+.4f}  std {wide.std(correction=0):.4f}"
        yield f"{name:<16}{list(values.shape)!s:<18}{kind:<10}{spread}"
    for i, (k, s, walked) in enumerate(
        zip(*(getattr(record.states, n) for n in ("k", "s", "trajectory")), strict=True)
    ):
        yield f"draw {i:<11}k {int(k):>3}  s {float(s):.6f}  {'trajectory' if walked else 'noised again'}"


def stats(args: argparse.Namespace) -> None:
    """Print how much there is, at which times, of which classes, and how fast the velocities are."""
    from shards.reader import Reader
    from shards.stats import collect_stats, stats_lines

    reader = Reader(args.folder)
    print("\n".join(stats_lines(reader, collect_stats(reader))))


def export_index(args: argparse.Namespace) -> None:
    """Write a dataset card and lists of the shards into a cache, for datasets, webdataset, wids and the hub."""
    from shards.manifest import Manifest, find_cache
    from shards.publish import export_index

    cache: Path = find_cache(args.folder)
    whole = cache.absolute()
    name = args.name or f"sollune cache {(whole.parent if whole.name == 'cache' else whole).name}"
    for path in export_index(cache, args.license, name):
        print(f"{path}: written")
    if args.license == UNKNOWN_LICENSE:
        print(f"its license is {UNKNOWN_LICENSE} - say --license before you publish it")
    told = Manifest.open(cache).recipe.information
    places = " and ".join(str(told[name]) for name in ("teacher_location", "teacher_path") if told.get(name))
    print(f"the card names no path of this machine; manifest.json says that the teacher lay at {places or None}")
    print("for Megatron-Energon run energon prepare on the folder: it takes the tars as they are")


def add_show_options(parser: argparse.ArgumentParser) -> None:
    """The words of `show`."""
    parser.add_argument("key", nargs="?", metavar="KEY", help="nine digits; the first record unless given")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="(default: train)")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The words of `export-index`."""
    parser.add_argument(
        "--license", default=UNKNOWN_LICENSE, metavar="ID", help=f"as the hub spells it ({UNKNOWN_LICENSE})"
    )
    parser.add_argument("--name", metavar="TEXT", help="title of the card (sollune cache, and the run folder's name)")


class ShardsCommand(NamedTuple):
    """What runs, and what else it may be told beside the folder."""

    run: Callable[[argparse.Namespace], int | None]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda words: None


COMMANDS: Mapping[str, ShardsCommand] = {
    "verify": ShardsCommand(verify),
    "show": ShardsCommand(show, add_show_options),
    "stats": ShardsCommand(stats),
    "export-index": ShardsCommand(export_index, add_export_options),
}


def main(argv: Sequence[str] | None = None, commands: Mapping[str, ShardsCommand] = COMMANDS) -> int:
    """Run one command; raises `Refused` for bad input."""
    parser = Parser(prog="sollune shards", description="Look into a cache.", allow_abbrev=False)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, command in commands.items():
        meaning = command.run.__doc__
        words = parsers.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        words.add_argument(
            "folder", type=path_argument, metavar="FOLDER", help="cache folder, or a run folder with a cache in it"
        )
        command.add_options(words)
    parsed = parser.parse_args(argv)
    return commands[parsed.command].run(parsed) or 0


if __name__ == "__main__":
    prepare_streams()
    sys.exit(run_to_exit_code(main, sys.argv[1:]))
