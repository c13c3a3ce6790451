"""How a cache was made, as the configuration beside it says: where its teacher lies, and what makes it again.

`sollune shards verify --deep`: whether the teacher would still say what the cache says that it said.

A record drawn: its picture, and what the teacher saw in each of its states.

`sollune shards ...`: the commands over a cache, with those that need its teacher or the story which made it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.load import load
from configs.values import location_argument, path_argument
from shards import __main__ as shards
from shards.__main__ import EXIT_DAMAGED
from shards.journal import JOURNAL_FOLDER as JOURNAL
from shards.journal import restore_entries
from shards.manifest import MANIFEST_FILE, Manifest, find_cache
from shards.record import Record
from shards.verify import quarantine
from stages.cache.audit import Comparison, RecordAudit, audit_record, load_recorded_teacher, sample
from stages.flow.bridge import x0_from_velocity
from stages.nets.components import load_components
from stages.nets.files import COMPONENT_NAMES, changed_components
from stages.nets.teacher import Teacher
from stages.sampling.grids import make_sheet, save_sheet
from stages.system.device import device_of
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused


@dataclass(frozen=True)
class CacheOrigin:
    """A cache's origin."""

    teacher_locations: Sequence[str]
    """where its teacher lies: a diffusers folder or hub id, and where that was on the machine that named it"""
    remake: Callable[[], None]
    """makes what is missing"""

    def teacher_location(self) -> str:
        """Where the teacher is; raises `Refused` when it is nowhere."""
        from stages.nets.files import find_teacher

        return find_teacher(self.teacher_locations)[0]


def find_origin(cache: Path, teacher: str | None = None) -> CacheOrigin:
    """The origin of a cache; `teacher` says where the teacher lies now, if it moved.

    Raises `Refused` when no story's configuration lies beside it.
    """
    told, classes = cache.parent / "cache.yaml", cache.parent / "config.yaml"
    if told.is_file():
        return _teacher_cache_origin(cache, told, teacher)
    if classes.is_file():
        return _class_cache_origin(cache, classes, teacher)
    raise Refused(f"{told}: not there, so nothing says how {cache} was made - run its make target, or fetch it again")


def _teacher_cache_origin(cache: Path, file: Path, teacher: str | None) -> CacheOrigin:
    from stages import cache_teacher

    words = ["--run", str(cache.parent), *(["--teacher", teacher] if teacher else [])]
    config = load(cache_teacher.Config, "cache_teacher", [file], words)
    path = None if teacher or not (cache / MANIFEST_FILE).exists() else _recorded_teacher_path(cache)
    if path and not Path(config.teacher).is_dir() and Path(path).is_dir():
        config = config.model_copy(update={"teacher": path})
    return CacheOrigin([config.teacher, *([path] if path else [])], partial(cache_teacher.run, config))


def _recorded_teacher_path(cache: Path) -> str | None:
    """Where the teacher lay on the machine that made the cache, as its manifest says; a broken one says nothing."""
    try:
        path = Manifest.open(cache).recipe.information.get("teacher_path")
    except Refused:
        return None
    return path if isinstance(path, str) else None


def _class_cache_origin(cache: Path, file: Path, teacher: str | None) -> CacheOrigin:
    """The class pictures of a run; the class file that they were painted for lies beside them."""
    from stages import finetune_classes
    from stages.nets.saved import Origin

    words = ["--run", str(cache.parent.parent), "--classes", str(cache.parent / "classes.yaml")]
    config = load(finetune_classes.Config, "finetune_classes", [file], words)
    origin = Origin.open(cache.parent).with_teacher(teacher)
    return CacheOrigin(origin.teacher_locations(), partial(finetune_classes.refill_class_cache, config, origin))


BINS = 10
WAY_OUT = "name the teacher that made the cache with --teacher, or make the cache in a new folder"


def audit_cache(args: argparse.Namespace, device: torch.device) -> int:
    """Ask the cache's teacher again about a sample of records; the exit code is 1 when it says otherwise."""
    cache: Path = find_cache(args.folder)
    manifest = Manifest.open(cache)
    location = args.teacher or find_origin(cache).teacher_location()
    teacher = load_recorded_teacher(manifest, location, device)
    changed = list(other_parts(manifest, teacher))
    said = f"teacher {location}"
    if changed:
        print(f"sollune: {said}: {', '.join(changed)} is not what the recipe names - {WAY_OUT}", file=sys.stderr)
    else:
        print(f"{said}: the one that the recipe names")

    # A recipe that does not tell its device was made where nothing rounds to TF32, as far as anybody knows.
    rough = device.type == "cuda" or manifest.recipe.information.get("device", "cpu") != "cpu"
    audited = [
        audit_record(teacher, record, file, rough) for file, record in sample(cache, manifest, args.sample, args.seed)
    ]
    records = sum(shard.records for shard in manifest.shards)
    print(
        f"audit of {len(audited)} of {records} records, {teacher.precision} on {device}; largest errors of tolerances:"
    )
    print("\n".join(table(audited)))
    if rough:
        print("convolutions of a GPU round to TF32: a single tensor that is 1 % off may stay below such tolerances")
    bad = [one for one in audited if one.worst().error_ratio > 1]
    for one in bad:
        print(
            f"sollune: {mismatch_line(cache, one)} - {WAY_OUT}; a broken kernel here or there does it too",
            file=sys.stderr,
        )
    if bad or changed:
        return EXIT_DAMAGED
    print("the teacher says the same")
    return 0


def other_parts(manifest: Manifest, teacher: Teacher) -> Iterator[str]:
    """The parts of the teacher whose files are not those that made the cache."""
    wanted: Any = manifest.recipe.identity.get("teacher")
    if not isinstance(wanted, Mapping):
        return iter(COMPONENT_NAMES)
    missing = [part for part in COMPONENT_NAMES if part not in wanted]
    return iter([*missing, *changed_components(wanted, teacher.components.folder)])


def mismatch_line(cache: Path, record_audit: RecordAudit) -> str:
    """The line about a record that the teacher answers otherwise."""
    worst, bad = record_audit.worst(), sum(compared.error_ratio > 1 for compared in record_audit.comparisons)
    at = "" if worst.s is None else f" at s = {worst.s:.4f}"
    return (
        f"shard {cache / record_audit.file}: record {record_audit.key}: {worst.quantity}{at} is off by "
        f"{worst.error:.1e}, tolerance "
        f"{worst.tolerance:.1e} (beyond rounding to half, in sizes of the tensor; {bad} of "
        f"{len(record_audit.comparisons)} are off)"
    )


def table(audited: Sequence[RecordAudit]) -> Iterator[str]:
    """Errors against tolerances, for each bin of s."""
    every = [compared for one in audited for compared in one.comparisons]
    yield f"{'s':<12}{'states':>8}" + "".join(f"{name:>22}" for name in ("v_cond", "v_uncond", "features"))
    for i in range(BINS):
        here = [one for one in every if one.s is not None and min(int(one.s * BINS), BINS - 1) == i]
        states = sum(one.quantity == "v_cond" for one in here)
        columns = "".join(f"{_worst(here, name):>22}" for name in ("v_cond", "v_uncond", "features"))
        yield f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}  {states:>8}{columns}"
    yield f"{'cond':<12}{len(audited):>8}{_worst(every, 'cond'):>22}"


def _worst(compared: Sequence[Comparison], name: str) -> str:
    found = [one for one in compared if one.quantity.split(".")[0] == name]
    if not found:
        return "-"
    worst = max(found, key=lambda one: one.error_ratio)
    return f"{worst.error:.1e} of {worst.tolerance:.1e}"


def save_record_picture(record: Record, teacher: str, path: Path) -> None:
    """A row of pictures as PNG: x0, then x0_hat = x_t - s v_cond of each state, from noise to data."""
    parts = load_components(teacher, device_of("auto"), torch.float32)
    draws = record.states
    seen = x0_from_velocity(draws.x_t.float(), draws.v_cond.float(), draws.s)
    order = draws.s.argsort(descending=True)
    latents = torch.cat([record.x0.float()[None], seen[order]]).to(parts.unet.device)
    pictures = Teacher(parts, "hold").decode_latents(latents)
    heads = ["x0", *(f"s {float(draws.s[i]):.3f}" for i in order)]
    settings = {"key": record.key, "text": record.text, "s": draws.s[order].tolist()}
    save_sheet(make_sheet([record.text], heads, [picture[None] for picture in pictures]), path, settings)


SAMPLE = 20


def verify(args: argparse.Namespace) -> int:
    """Check every file, record and row of the table; with --deep ask the teacher again about a sample of records."""
    if not args.deep:
        return shards.verify(args)

    device = device_of(args.device)  # refused before all of the cache is read
    return shards.verify(args) or audit_cache(args, device)


def repair(args: argparse.Namespace) -> int:
    """Move damaged files aside and make exactly those again, as the configuration beside the cache says."""
    cache: Path = find_cache(args.folder)
    origin = find_origin(cache, args.teacher)
    moved = quarantine(cache)
    for path in moved:
        print(f"moved aside: {path}")
    for path in restore_journal(cache):
        print(f"written again: {path}")
    if any(path.parent.name != JOURNAL for path in moved) or shards.verify(args):
        origin.remake()
    return shards.verify(args)


def restore_journal(cache: Path) -> list[Path]:
    """The entries of the journal that were missing; none are written where no manifest vouches for them."""
    try:
        return restore_entries(cache, Manifest.open(cache))
    except Refused:
        return []


def show(args: argparse.Namespace) -> None:
    """Print one record, and draw its picture with the teacher's decoder."""
    if args.picture and not args.no_picture:
        refuse_unwritable(args.picture)
    record = shards.selected_record(args)
    print("\n".join(shards.record_lines(record)))
    if args.no_picture:
        return

    path = args.picture or Path(f"{args.split}-{record.key}.png")
    try:
        save_record_picture(record, args.teacher or find_origin(find_cache(args.folder)).teacher_location(), path)
    except Refused as refusal:
        print(f"no picture: {refusal}")
    else:
        print(f"picture: {path}")


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """The words of `verify`."""
    parser.add_argument("--deep", action="store_true", help="ask the teacher again about a sample of records")
    parser.add_argument(
        "--sample", type=parse_record_count, default=SAMPLE, metavar="N", help=f"records of the sample ({SAMPLE})"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which sample (0)")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="torch device (auto: a GPU where there is one)"
    )
    add_teacher_option(parser)


def parse_record_count(word: str) -> int:
    """A number of records, one or more."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} should be 1 or more")
    return int(word)


def add_teacher_option(parser: argparse.ArgumentParser) -> None:
    """Where the teacher lies."""
    parser.add_argument(
        "--teacher",
        type=location_argument,
        metavar="FOLDER",
        help="where it lies (as the configuration beside the cache says)",
    )


def add_show_options(parser: argparse.ArgumentParser) -> None:
    """The words of `show`."""
    shards.add_show_options(parser)
    add_teacher_option(parser)
    parser.add_argument(
        "--picture", type=path_argument, metavar="FILE.png", help="where to draw it (SPLIT-KEY.png, right here)"
    )
    parser.add_argument("--no-picture", action="store_true", help="print only")


COMMANDS = {
    **shards.COMMANDS,
    "verify": shards.ShardsCommand(verify, add_verify_options),
    "repair": shards.ShardsCommand(repair, add_teacher_option),
    "show": shards.ShardsCommand(show, add_show_options),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; raises `Refused` for bad input."""
    return shards.main(argv, COMMANDS)
