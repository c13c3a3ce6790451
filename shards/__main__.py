"""`python -m shards verify|show|stats|export-index FOLDER`, which is `sollune shards ...` too."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.arguments import path_argument
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
        manifest = Manifest.open(folder)
    except Damaged as damage:
        print(f"sollune: {damage}", file=sys.stderr)
        return EXIT_DAMAGED
    exit_code = 0
    for fault in inspect(folder, manifest):
        exit_code = EXIT_DAMAGED
        hint = "" if " - " in fault.reason else f" - {repair_hint(folder)}"
        print(f"sollune: {escape_unprintable(fault.message(folder))}{hint}", file=sys.stderr)
    if exit_code:
        return exit_code
    for split in SPLITS:
        shards, records, states, size = manifest.totals(split)
        print(f"{split}: {shards} shards, {records} records, {states} states, {size:,} bytes")
        sizes = manifest.sizes_of(split)
        if len(sizes) > 1:
            of_sizes = (f"{manifest.totals(split, each).records} of {each}" for each in sizes)
            print(f"{split}: its records are {', '.join(of_sizes)}")
    if manifest.failures:
        print(f"{len(manifest.failures)} prompts gave no record (see stats)")
    print("ok")
    return 0


def show(args: argparse.Namespace) -> None:
    """Print one record: its texts, and shape, type, mean and deviation of its tensors."""
    print("\n".join(record_lines(selected_record(args))))


def selected_record(args: argparse.Namespace) -> "Record":
    """The record of this key, or the first of its split."""
    from shards.reader import Reader

    reader = Reader(args.folder, args.split)
    return reader.record(args.key) if args.key else next(reader.records())


def record_lines(record: "Record") -> Iterator[str]:
    """A record as lines of text."""
    from shards.record import tensors_of

    for name in ("key", "text", "class_name", "seed", "guidance_scale", "size"):
        if (value := getattr(record, name)) is not None:
            yield f"{name:<16}{escape_unprintable(str(value))}"
    for name, values in tensors_of(record).items():
        if values.dim() > 1:
            wide, dtype = values.double(), str(values.dtype).removeprefix("torch.")
            spread = f"mean {wide.mean():+.4f}  std {wide.std(correction=0):.4f}"
            yield f"{name:<16}{list(values.shape)!s:<18}{dtype:<10}{spread}"
    states = record.states
    for i, (k, s, on_trajectory) in enumerate(zip(states.k, states.s, states.trajectory, strict=True)):
        yield f"state {i:<10}k {int(k):>3}  s {float(s):.6f}  {'trajectory' if on_trajectory else 'fresh noise'}"

    if record.landings is not None:
        yield from (f"landing {i:<8}s {s:.6f}" for i, s in enumerate(record.landings.s.tolist()))


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
    path = cache.absolute()
    name = args.name or f"sollune cache {(path.parent if path.name == 'cache' else path).name}"
    for written in export_index(cache, args.license, name):
        print(f"{written}: written")
    if args.license == UNKNOWN_LICENSE:
        print(f"its license is {UNKNOWN_LICENSE} - set it with --license before you publish it")
    information = Manifest.open(cache).recipe.information
    paths = " and ".join(str(information[n]) for n in ("teacher_location", "teacher_path") if information.get(n))
    print(f"the card names no path of this machine; manifest.json names the teacher's: {paths or None}")
    print("for Megatron-Energon run energon prepare on the folder: it takes the tars as they are")


def add_show_options(parser: argparse.ArgumentParser) -> None:
    """The options of `show`."""
    parser.add_argument("key", nargs="?", metavar="KEY", help="nine digits (default: the first record)")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="(default: train)")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options of `export-index`."""
    parser.add_argument(
        "--license", default=UNKNOWN_LICENSE, metavar="ID", help=f"as the hub spells it ({UNKNOWN_LICENSE})"
    )
    parser.add_argument("--name", metavar="TEXT", help="title of the card (sollune cache, and the run folder's name)")


class ShardsCommand(NamedTuple):
    """What runs, and its options beside the folder."""

    run: Callable[[argparse.Namespace], int | None]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


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
        text = command.run.__doc__
        command_parser = parsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        command_parser.add_argument(
            "folder", type=path_argument, metavar="FOLDER", help="cache folder, or a run folder with a cache in it"
        )
        command.add_options(command_parser)
    args = parser.parse_args(argv)
    return commands[args.command].run(args) or 0


if __name__ == "__main__":
    prepare_streams()
    sys.exit(run_to_exit_code(main, sys.argv[1:]))
