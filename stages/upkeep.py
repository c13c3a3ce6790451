"""`sollune shards ...`: the commands over a cache, with those that need its teacher or the command that made it."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.arguments import location_argument, path_argument
from configs.load import load
from configs.values import Stored
from configs.yaml_text import read_yaml
from shards import __main__ as shards
from shards.__main__ import EXIT_DAMAGED
from shards.journal import JOURNAL_FOLDER, restore_entries
from shards.manifest import MANIFEST_FILE, Manifest, find_cache
from shards.record import Record
from shards.verify import quarantine
from stages.flow.bridge import x0_from_velocity
from stages.system.device import device_of
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused
from stages.system.storage.attached import attach_all
from stages.system.storage.locations import map_locations
from stages.teacher_files.folder import COMPONENT_NAMES
from stages.teacher_files.recorded import changed_parts, find_source
from stages.teacher_files.source import TeacherSource

if TYPE_CHECKING:  # what loads networks takes seconds, and most of these commands need none
    from stages.nets.teacher import Teacher

AUDITED_RECORDS = 20
AUDIT_HINT = "name the teacher that made the cache with --teacher, or make the cache in a new folder"


def verify(args: argparse.Namespace) -> int:
    """Check every file, record and row of the table; with --deep run the teacher again on a sample of records."""
    if not args.deep:
        return shards.verify(args)
    device = device_of(args.device)  # refused before all of the cache is read
    return shards.verify(args) or audit_cache(args, device)


def repair(args: argparse.Namespace) -> int:
    """Move damaged files aside and make exactly those again, by the configuration beside the cache."""
    cache: Path = find_cache(args.folder)
    origin = find_origin(cache, args.teacher)
    moved = quarantine(cache)
    for path in moved:
        print(f"moved aside: {path}")
    for path in restore_journal(cache):
        print(f"written again: {path}")
    is_lost = not (cache / MANIFEST_FILE).exists()  # or moved aside: the journal makes it again
    if is_lost or any(path.parent.name != JOURNAL_FOLDER for path in moved) or shards.verify(args):
        origin.remake()
    return shards.verify(args)


def show(args: argparse.Namespace) -> None:
    """Print one record, and decode its picture with the teacher."""
    if args.picture and not args.no_picture:
        refuse_unwritable(args.picture)
    record = shards.selected_record(args)
    print("\n".join(shards.record_lines(record)))
    if args.no_picture:
        return
    path = args.picture or Path(f"{args.split}-{record.key}.png")
    try:
        save_record_picture(record, teacher_of(find_cache(args.folder), args.teacher), path)
    except Refused as refusal:
        print(f"no picture: {refusal}")
    else:
        print(f"picture: {path}")


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    count_help = f"records of the sample ({AUDITED_RECORDS})"
    parser.add_argument("--deep", action="store_true", help="run the teacher again on a sample of records")
    parser.add_argument("--sample", type=parse_record_count, default=AUDITED_RECORDS, metavar="N", help=count_help)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which sample (0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="torch device (auto: a GPU if there is one)")
    add_teacher_option(parser)


def parse_record_count(text: str) -> int:
    """A number of records, one or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} should be 1 or more")
    return int(text)


def add_teacher_option(parser: argparse.ArgumentParser) -> None:
    """The option for a teacher that was moved."""
    text = "where the teacher is (default: by the configuration beside the cache)"
    parser.add_argument("--teacher", type=location_argument, metavar="FOLDER", help=text)


def add_show_options(parser: argparse.ArgumentParser) -> None:
    """The options of `show`."""
    shards.add_show_options(parser)
    add_teacher_option(parser)
    text = "where to write the picture (SPLIT-KEY.png, in this folder)"
    parser.add_argument("--picture", type=path_argument, metavar="FILE.png", help=text)
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


@dataclass(frozen=True)
class CacheOrigin:
    """How a cache was made, by the configuration beside it."""

    teacher_sources: Sequence[TeacherSource]
    """its teacher as it was named, and by its path on the machine that made the cache"""
    remake: Callable[[], None]
    """makes what is missing"""

    def teacher_source(self) -> TeacherSource:
        """The teacher where it is now; raises `Refused` when it is at none of the places."""
        return find_source(self.teacher_sources)

    def teacher_location(self) -> str:
        """Where the teacher is; raises `Refused` likewise."""
        return self.teacher_source().location


def teacher_of(cache: Path, teacher: str | None) -> TeacherSource:
    """The teacher that made a cache, at `teacher` if it was moved, by the configuration beside the cache otherwise."""
    if teacher is None:
        return find_origin(cache).teacher_source()
    recorded = _recorded_source(cache)
    return recorded.at(teacher) if recorded else TeacherSource(location=teacher)


def find_origin(cache: Path, teacher: str | None = None) -> CacheOrigin:
    """The origin of a cache; `teacher` is where the teacher is now, if it was moved.

    Raises `Refused` when no configuration of a command is beside the cache.
    """
    settings, class_settings = cache.parent / "cache.yaml", cache.parent / "config.yaml"
    if settings.is_file():
        return _teacher_cache_origin(cache, settings, teacher)
    if class_settings.is_file():
        return _class_cache_origin(cache, class_settings, teacher)
    raise Refused(
        f"{settings}: not there, so nothing says how {cache} was made - run its make target, or fetch it again"
    )


def _teacher_cache_origin(cache: Path, file: Path, teacher: str | None) -> CacheOrigin:
    from stages import cache_teacher

    argv = ["--run", str(cache.parent), *(["--teacher", teacher] if teacher else []), *_windows_of(file)]
    config = load(cache_teacher.Config, "cache_teacher", [file], argv)
    attach_all(config.model_dump())
    recorded = _recorded_source(cache) if (cache / MANIFEST_FILE).exists() else None
    if recorded:
        config = config.model_copy(update={"teacher": _where_it_lies(config.teacher, recorded, moved=bool(teacher))})
    others = [] if teacher or recorded is None else [config.teacher.at(recorded.location)]
    return CacheOrigin([config.teacher, *others], partial(cache_teacher.run, config))


def _windows_of(file: Path) -> list[str]:
    """The option for the windows of a cache whose settings do not name them: they are of a version that had none."""
    content: Any = read_yaml(file, str(file), "it tells how the cache beside it was made")
    for name in ("cache_teacher", "render", "states", "windows"):
        if not isinstance(content, dict) or name not in content:
            return ["--render.states.windows", "0"]
        content = content[name]
    return []


def _where_it_lies(named: TeacherSource, recorded: TeacherSource, *, moved: bool) -> TeacherSource:
    """The teacher as it was named, with the recorded absolute path of each of its files that is not there so."""
    places: dict[str, Any] = {}
    for name in ("parts_from", "config", "vae", *(() if moved else ("location",))):
        now, then = getattr(named, name), getattr(recorded, name)
        if now and then and not Path(now).exists() and Path(then).exists():
            places[name] = then
    for name, key in (("loras", "file"), ("mix", "model")):
        now, then = getattr(named, name), getattr(recorded, name)
        if len(now) == len(then):
            places[name] = tuple(_entry_that_lies(*pair, key) for pair in zip(now, then, strict=True))
    return named.model_copy(update=places)


def _entry_that_lies(now: Stored, then: Stored, key: str) -> Stored:
    """An entry as it was named, or as recorded where its file is not there so and all else is the same."""
    place = getattr(then, key)
    same = then == now.model_copy(update={key: place})
    return then if same and not Path(getattr(now, key)).exists() and Path(place).exists() else now


def _recorded_source(cache: Path) -> TeacherSource | None:
    """The teacher's files on the machine that made the cache, by its manifest; None for a broken manifest."""
    try:
        information = Manifest.open(cache).recipe.information
        source, path = information.get("teacher_source"), information.get("teacher_path")
        if source is None:
            return TeacherSource(location=path) if isinstance(path, str) else None
        attach_all(map_locations(source))
        return TeacherSource.model_validate(source)
    except (Refused, ValueError):  # pydantic's too
        return None


def _class_cache_origin(cache: Path, file: Path, teacher: str | None) -> CacheOrigin:
    """The origin of a run's class pictures; the class file is beside them."""
    from stages import finetune_classes
    from stages.nets.run_folder import Origin

    argv = ["--run", str(cache.parent.parent), "--classes", str(cache.parent / "classes.yaml")]
    config = load(finetune_classes.Config, "finetune_classes", [file], argv)
    origin = Origin.open(cache.parent).with_teacher(teacher)
    return CacheOrigin(origin.teacher_sources(), partial(finetune_classes.refill_class_cache, config, origin))


def restore_journal(cache: Path) -> list[Path]:
    """Write the missing entries of the journal again, and return them; none without a valid manifest."""
    try:
        return restore_entries(cache, Manifest.open(cache))
    except Refused:
        return []


def audit_cache(args: argparse.Namespace, device: torch.device) -> int:
    """Run the cache's teacher again on a sample of records; the exit code is 1 when its outputs differ."""
    from stages.cache import audit  # loads diffusers

    cache: Path = find_cache(args.folder)
    manifest = Manifest.open(cache)
    source = teacher_of(cache, args.teacher)
    location, teacher = source.location, audit.load_recorded_teacher(manifest, source, device)
    changed = list(other_parts(manifest, teacher))
    if changed:
        problem = f"{', '.join(changed)} is not what the recipe names"
        print(f"sollune: teacher {location}: {problem} - {AUDIT_HINT}", file=sys.stderr)
    else:
        print(f"teacher {location}: the one that the recipe names")

    # A recipe without a device is of a version that made caches on the CPU, where nothing rounds to TF32.
    rough = device.type == "cuda" or manifest.recipe.information.get("device", "cpu") != "cpu"
    samples, states = audit.sample(cache, manifest, args.sample, args.seed), audit.recorded_states(manifest)
    audits = [audit.audit_record(teacher, record, file, rough, states) for file, record in samples]
    records = sum(shard.records for shard in manifest.shards)
    head = f"audit of {len(audits)} of {records} records, {teacher.precision} on {device}"
    print("\n".join([f"{head}; largest errors of tolerances:", *audit.error_table(audits)]))
    if rough:
        print("convolutions of a GPU round to TF32: a single tensor that is 1 % off may stay below such tolerances")
    bad = [one for one in audits if one.worst().error_ratio > 1]
    for one in bad:
        line = audit.mismatch_line(cache, one)
        print(f"sollune: {line} - {AUDIT_HINT}; a broken kernel here or there does it too", file=sys.stderr)
    if bad or changed:
        return EXIT_DAMAGED
    print("the outputs are the same")
    return 0


def other_parts(manifest: Manifest, teacher: "Teacher") -> Iterator[str]:
    """The parts of the teacher whose files are not those that made the cache."""
    recorded: Any = manifest.recipe.identity.get("teacher")
    if not isinstance(recorded, Mapping):
        return iter(COMPONENT_NAMES)
    missing = [part for part in COMPONENT_NAMES if part not in recorded]
    files = teacher.components.files
    return iter([*missing, *(changed_parts(recorded, files) if files else ())])


def save_record_picture(record: Record, teacher: TeacherSource, path: Path) -> None:
    """A row of pictures as PNG: x0, then x0_hat = x_s - s v_cond of each state, from noise to data."""
    from stages.nets.components import load_components
    from stages.nets.teacher import Teacher
    from stages.sampling.grids import make_sheet, save_sheet

    components = load_components(teacher, device_of("auto"), torch.float32)
    states = record.states
    x0_hat = x0_from_velocity(states.x_s.float(), states.v_cond.float(), states.s)
    order = states.s.argsort(descending=True)
    latents = torch.cat([record.x0.float()[None], x0_hat[order]]).to(components.unet.device)
    pictures = Teacher(components, "hold").decode_latents(latents)
    heads = ["x0", *(f"s {float(states.s[i]):.3f}" for i in order)]
    settings = {"key": record.key, "text": record.text, "s": states.s[order].tolist()}
    save_sheet(make_sheet([record.text], heads, [picture[None] for picture in pictures]), path, settings)
