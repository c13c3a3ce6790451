"""Which files of an earlier export are as it left them: whatever else lies there is its reader's, and is not lost.

A folder that takes the place of an earlier export whole, or not at all.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.export import tensorfile
from stages.export.comfyui import is_unmodified_workflow
from stages.hub.snapshot import link_or_copy
from stages.nets.files import read_json
from stages.system.atomic import PARTIAL_SUFFIX, fsync_folder, is_abandoned, temporary_path
from stages.system.disk import system_error, unwritable_error
from stages.system.refusal import Refused, in_one_line
from stages.train.checkpoint_store import sha256

FACTS_FILE = "sollune.json"
"""What the folder says of itself; by it an export of ours is known."""
FILES_KEY = "files"
"""Its key with the sha256 of every file beside it, and of all else that it says itself."""
LEGACY_FILES = re.compile(
    r"sollune\.json|README\.md|model_index\.json|samples\.png|LICENSE[^/]*|scheduler/scheduler_config\.json"
    r"|tokenizer/(vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|tokenizer/merges\.txt"
    r"|(unet|vae|text_encoder)/(config\.json|(diffusion_pytorch_)?model(\.fp16)?\.safetensors)"
)
"""The files of an export that was made before exports listed theirs."""


def read_facts(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself; raises `Refused` where that names no type, prediction or shift."""
    facts = read_json(folder / FACTS_FILE)
    if facts.get("dtype") not in ("float16", "float32") or not isinstance(facts.get("prediction"), str):
        said = f"dtype is {facts.get('dtype')!r:.40} and prediction {facts.get('prediction')!r:.40}"
        raise Refused(f"{folder / FACTS_FILE}: {said}, so nobody can tell what it holds - export the run again")
    shift = facts.get("flow_shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise Refused(f"{folder / FACTS_FILE}: flow_shift is {shift!r:.40}, not a number - export the run again")
    return facts


@dataclass(frozen=True)
class ForeignFiles:
    """What is not ours in an exported folder, as paths in it."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    """Files of ours that hold something else by now."""
    has_file_list: bool = True
    """Whether the export says which files it wrote; else what it did not is known by the name alone."""


def find_foreign_files(folder: Path) -> ForeignFiles:
    """What was added to an exported folder and what was changed in it; raises `Refused` when it is none of ours."""
    if not (folder / FACTS_FILE).is_file():
        raise Refused(
            f"{folder}: stands in the way and is no export of ours ({FACTS_FILE} is missing) - move it, or set --out"
        )
    facts = read_json(folder / FACTS_FILE)
    there = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    listed = facts.pop(FILES_KEY, None)
    if not isinstance(listed, Mapping):
        return ForeignFiles(tuple(name for name in there if not LEGACY_FILES.fullmatch(name)), (), has_file_list=False)
    digests = {name: _digest(folder, name, facts) for name in there if name in listed}
    return ForeignFiles(
        tuple(name for name in there if name not in listed),
        tuple(name for name, digest in digests.items() if digest != listed[name]),
    )


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `sollune.json` last of all, with the hash of each file that lies in the folder by then."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    recorded = json.loads(json.dumps(facts, default=str))
    listed = {name: _digest(folder, name, recorded) for name in [*names, FACTS_FILE]}
    text = json.dumps({**recorded, FILES_KEY: listed}, indent=2, sort_keys=True)
    (folder / FACTS_FILE).write_text(f"{text}\n", encoding="utf-8")


def _digest(folder: Path, name: str, facts: Mapping[str, Any]) -> str:
    """The hash of a file; of `sollune.json` that of the facts in it. A link is nobody's file."""
    if name == FACTS_FILE:
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / name
    return "a link" if path.is_symlink() else sha256(path)


def copy_added_files(earlier: Path, new: Path) -> None:
    """Take what was added to an earlier export over into the new one; raises `Refused` where both have a file."""
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


MOVE_REMEDY = "move it away, or choose another folder with --out"


def refuse_changed(folder: Path) -> None:
    """Raise `Refused` with the names where files of an exported folder were changed since."""
    if (folder.exists() or folder.is_symlink()) and (changed := find_foreign_files(folder).changed):
        raise Refused(f"{folder}: {', '.join(changed)}: changed since the export wrote it - {MOVE_REMEDY}")


def refuse_foreign_file(file: Path) -> None:
    """Raise `Refused` unless a tensor file or a workflow that would be written over is as an export left it."""
    if not (file.exists() or file.is_symlink()) or is_unmodified_export(file):
        return
    raise Refused(f"{file}: is not as an export of ours wrote it, and would be written over - {MOVE_REMEDY}")


def is_unmodified_export(file: Path) -> bool:
    """Whether a file beside the diffusers folder is one of ours, unchanged."""
    if file.is_symlink() or not file.is_file():
        return False
    if file.suffix == ".json":
        return is_unmodified_workflow(file.read_text(encoding="utf-8", errors="replace"))
    said = read_header(file)
    if "sollune.prediction" not in said or not tensorfile.has_valid_header_hash(said):
        return False
    with suppress(OSError):
        return tensorfile.hash_file_tensors(file) == said.get("modelspec.hash_sha256")
    return False


def read_header(file: Path) -> dict[str, str]:
    """The metadata of a tensor file; empty where it has none, or is no such file."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


EARLIER_SUFFIX = ".earlier"


@contextmanager
def replace_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its place when the block ends well and is removed when it does not.

    What others added to the earlier one goes with it (`keep_added`). Raises `Refused` where `final` is no export of
    ours, or was changed since.
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
        if found := system_error(error):
            raise unwritable_error(final, found) from error
        raise Refused(f"{final}: cannot be written ({in_one_line(error)}) - run the same command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(final: Path) -> None:
    """Remove what killed exports left half-written; what one had moved aside comes back if nothing took its place."""
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
    """Put `new` in the place of `final`; the earlier one comes back if that fails, and goes if it does not."""
    for path in new.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
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
