"""`python -m shards verify|show|stats FOLDER`, which is `sollune shards ...` too."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from configs.refusal import Refused

DAMAGED, REFUSED = 1, 2


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
        print(f"sollune: {fault.told(folder)} - {way_out(folder)}", file=sys.stderr)
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
    from shards.reader import Reader
    from shards.stats import parts

    reader = Reader(words.folder, words.split)
    record = reader.record(words.key) if words.key else next(reader.records())
    for name in ("key", "text", "class_name", "seed", "guidance_scale"):
        print(f"{name:<16}{getattr(record, name)}")
    named = {name: values[0] for name, values in parts(record).items() if len(values) == 1}
    named |= {f"features.{block}": values for block, values in record.features.by_block.items()}
    for name, values in named.items():
        kind = str(values.dtype).removeprefix("torch.")
        wide = values.double()
        spread = f"mean {wide.mean():+.4f}  std {wide.std(correction=0):.4f}"
        print(f"{name:<16}{list(values.shape)!s:<18}{kind:<10}{spread}")
    for i, (k, s, walked) in enumerate(zip(*(getattr(record.draws, n) for n in ("k", "s", "trajectory")), strict=True)):
        print(f"draw {i:<11}k {int(k):>3}  s {float(s):.6f}  {'trajectory' if walked else 'noised again'}")


def stats(words: argparse.Namespace) -> None:
    """Print how much there is, at which times, of which classes, and how fast the velocities are."""
    from shards.reader import Reader
    from shards.stats import report, stats_of

    reader = Reader(words.folder)
    print("\n".join(report(reader, stats_of(reader))))


Command: TypeAlias = Callable[[argparse.Namespace], int | None]
COMMANDS: Mapping[str, Command] = {"verify": verify, "show": show, "stats": stats}


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run one command; raises `Refused` for bad input."""
    parser = argparse.ArgumentParser(prog="sollune shards", description="Look into a cache.", allow_abbrev=False)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, command in commands.items():
        words = parsers.add_parser(name, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        words.add_argument(
            "folder", type=Path, metavar="FOLDER", help="cache folder, or a run folder with a cache in it"
        )
        if name == "show":
            words.add_argument("--key", help="nine digits; the first record unless given")
            words.add_argument("--split", choices=("train", "validation"), default="train", help="(default: train)")
    parsed = parser.parse_args(argv)
    return commands[parsed.command](parsed) or 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refusal:
        print(f"sollune: {refusal}", file=sys.stderr)
        sys.exit(REFUSED)
