"""An exported folder: what it states of itself, which files in it are as written, and how a new one replaces it whole.

Files that were added to an export by others are kept; those of ours that were changed since are never lost silently.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.values import PictureSize
from stages.export import tensorfile
from stages.export.comfyui import is_unmodified_workflow
from stages.hub.snapshot import link_or_copy
from stages.system.atomic import PARTIAL_SUFFIX, fsync_folder, is_abandoned, temporary_path
from stages.system.disk import file_sha256, system_error, unwritable_error
from stages.system.refusal import Refused, in_one_line
from stages.teacher_files.folder import read_json

FACTS_FILE = "sollune.json"
"""The facts of an export, by which one of ours is known."""
FILES_KEY = "files"
"""Key of the facts with the sha256 of every file of the folder, and of all other facts."""
LEGACY_FILES = re.compile(
    r"sollune\.json|README\.md|model_index\.json|samples\.png|LICENSE[^/]*|scheduler/scheduler_config\.json"
    r"|tokenizer/(vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|tokenizer/merges\.txt"
    r"|(unet|vae|text_encoder)/(config\.json|(diffusion_pytorch_)?model(\.fp16)?\.safetensors)"
)
"""The files of an export of early versions, which did not list theirs."""
MOVE_REMEDY = "move it away, or choose another folder with --out"
MAX_CLIP_SKIP = 100
EARLIER_SUFFIX = ".earlier"


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `sollune.json` last of all, with the hash of each file that lies in the folder by then."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    recorded = json.loads(json.dumps(facts, default=str))
    hashes = {name: _digest(folder, name, recorded) for name in [*names, FACTS_FILE]}
    text = json.dumps({**recorded, FILES_KEY: hashes}, indent=2, sort_keys=True)
    (folder / FACTS_FILE).write_text(f"{text}\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of an exported folder; raises `Refused` where it is none of ours, or its type or shift is unusable."""
    file = folder / FACTS_FILE
    if not file.is_file():
        hint = "export the run first, or name the diffusers folder of an export"
        raise Refused(f"{folder}: no export of ours ({FACTS_FILE} is missing) - {hint}")
    facts = read_json(file)
    if facts.get("dtype") not in ("float16", "float32") or not isinstance(facts.get("prediction"), str):
        state = f"dtype is {facts.get('dtype')!r:.40} and prediction {facts.get('prediction')!r:.40}"
        raise Refused(f"{file}: {state}, so its content is unknown - export the run again")
    shift = facts.get("flow_shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise Refused(f"{file}: flow_shift is {shift!r:.40}, not a positive number - export the run again")
    skip = facts.get("clip_skip", 0)
    if type(skip) is not int or not 0 <= skip <= MAX_CLIP_SKIP:
        raise Refused(f"{file}: clip_skip is {skip!r:.40}, not a number of layers - export the run again")
    learnt_sizes(folder, facts)
    return facts


def learnt_sizes(folder: Path, facts: Mapping[str, Any]) -> tuple[PictureSize, ...]:
    """The picture sizes that the facts state, the most frequent first; none in exports of early versions.

    Raises `Refused` for what is no list of sizes.
    """
    sizes = facts.get("sizes", [])
    try:
        if not isinstance(sizes, list):
            raise ValueError
        return tuple(map(PictureSize.parse, sizes))
    except ValueError as error:
        message = f"{folder / FACTS_FILE}: sizes is {sizes!r:.40}, not a list of sizes such as 512x768"
        raise Refused(f"{message} - export the run again") from error


@dataclass(frozen=True)
class ForeignFiles:
    """The files in an exported folder that are not ours, as paths in it."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    """Files of ours with other content by now."""
    has_file_list: bool = True
    """Whether the export lists its files; those of one that does not are known by their names alone."""


def find_foreign_files(folder: Path) -> ForeignFiles:
    """The files added to an exported folder and those changed in it; raises `Refused` when it is none of ours."""
    if not (folder / FACTS_FILE).is_file():
        hint = "move it, or set --out"
        raise Refused(f"{folder}: has that name and is no export of ours ({FACTS_FILE} is missing) - {hint}")
    facts = read_json(folder / FACTS_FILE)
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    hashes = facts.pop(FILES_KEY, None)
    if not isinstance(hashes, Mapping):
        return ForeignFiles(tuple(name for name in names if not LEGACY_FILES.fullmatch(name)), (), has_file_list=False)
    return ForeignFiles(
        tuple(name for name in names if name not in hashes),
        tuple(name for name in names if name in hashes and _digest(folder, name, facts) != hashes[name]),
    )


def _digest(folder: Path, name: str, facts: Mapping[str, Any]) -> str:
    """The hash of a file; of `sollune.json` that of the facts in it. No link has a hash of ours."""
    if name == FACTS_FILE:
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / name
    return "a link" if path.is_symlink() else file_sha256(path)


def copy_added_files(earlier: Path, new: Path) -> None:
    """Copy the files added to an earlier export into the new one; raises `Refused` where both have one of that name."""
    if not earlier.exists():
        return
    foreign = find_foreign_files(earlier)
    for name in foreign.added:
        source, target = earlier / name, new / name
        if target.exists() or target.is_symlink():
            if not foreign.has_file_list:
                continue
            raise Refused(f"{source}: is not ours, and the export writes a file of that name - {MOVE_REMEDY}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            link_or_copy(source, target)


def refuse_changed(folder: Path) -> None:
    """Raise `Refused` with the names where files of an exported folder were changed since."""
    if (folder.exists() or folder.is_symlink()) and (changed := find_foreign_files(folder).changed):
        raise Refused(f"{folder}: {', '.join(changed)}: changed since the export wrote it - {MOVE_REMEDY}")


def refuse_foreign_file(file: Path) -> None:
    """Raise `Refused` unless a tensor file or a workflow that would be written over is as an export left it."""
    if (file.exists() or file.is_symlink()) and not is_unmodified_export(file):
        raise Refused(f"{file}: is not as an export of ours wrote it, and would be written over - {MOVE_REMEDY}")


def is_unmodified_export(file: Path) -> bool:
    """Whether a file beside the diffusers folder is one of ours, unchanged."""
    if file.is_symlink() or not file.is_file():
        return False
    if file.suffix == ".json":
        return is_unmodified_workflow(file.read_text(encoding="utf-8", errors="replace"))
    header = read_header(file)
    if "sollune.prediction" not in header or not tensorfile.has_valid_header_hash(header):
        return False
    with suppress(OSError):
        return tensorfile.hash_file_tensors(file) == header.get("modelspec.hash_sha256")
    return False


def read_header(file: Path) -> dict[str, str]:
    """The metadata of a tensor file; empty where it has none, or is no such file."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


@contextmanager
def replace_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its place when the block ends well and is removed when it does not.

    Raises `Refused` where `final` is no export of ours, or was changed since.
    """
    refuse_changed(final)
    temporary = temporary_path(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        temporary.mkdir()
        yield temporary
        _replace(temporary, final)
    except (OSError, SafetensorError) as error:
        if os_error := system_error(error):
            raise unwritable_error(final, os_error) from error
        raise Refused(f"{final}: cannot be written ({in_one_line(error)}) - run the same command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(final: Path) -> None:
    """Remove the partial folders of killed exports; the folder that one moved aside is restored if `final` is gone."""
    for left in final.parent.glob(f".{final.name}.*{PARTIAL_SUFFIX}"):
        if is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    for left in final.parent.glob(f".{final.name}.*{EARLIER_SUFFIX}"):
        if is_abandoned(left.with_suffix(PARTIAL_SUFFIX)):
            if final.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(final)


def _replace(new: Path, final: Path) -> None:
    """Rename `new` to `final`; the earlier folder is restored if that fails, and removed if it does not."""
    fsync_files(new)
    earlier = new.with_suffix(EARLIER_SUFFIX)
    if final.exists():
        final.rename(earlier)
    try:
        new.rename(final)
    except OSError:
        if earlier.exists():
            earlier.rename(final)
        raise
    fsync_folder(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def fsync_files(folder: Path) -> None:
    """Make the content of every file below a folder durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
