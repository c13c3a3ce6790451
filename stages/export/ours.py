"""Which files of an earlier export are as it left them: whatever else lies there is its reader's, and is not lost."""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.refusal import Refused
from stages.export import tensorfile
from stages.export.comfyui import is_as_written
from stages.export.parcel import link_or_copy
from stages.nets.files import read_json
from stages.train.statement import sha256

FACTS = "sollune.json"
"""What the folder says of itself; by it an export of ours is known."""
FILES = "files"
"""Its key with the sha256 of every file beside it, and of all else that it says itself."""
UNLISTED = re.compile(
    r"sollune\.json|README\.md|model_index\.json|samples\.png|LICENSE[^/]*|scheduler/scheduler_config\.json"
    r"|tokenizer/(vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|tokenizer/merges\.txt"
    r"|(unet|vae|text_encoder)/(config\.json|(diffusion_pytorch_)?model(\.fp16)?\.safetensors)"
)
"""The files of an export that was made before exports listed theirs."""


def facts_of(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself; raises `Refused` where that names no type, prediction or shift."""
    facts = read_json(folder / FACTS)
    if facts.get("dtype") not in ("float16", "float32") or not isinstance(facts.get("prediction"), str):
        said = f"dtype is {facts.get('dtype')!r:.40} and prediction {facts.get('prediction')!r:.40}"
        raise Refused(f"{folder / FACTS}: {said}, so nobody can tell what it holds - export the run again")
    shift = facts.get("flow_shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise Refused(f"{folder / FACTS}: flow_shift is {shift!r:.40}, not a number - export the run again")
    return facts


@dataclass(frozen=True)
class Foreign:
    """What is not ours in an exported folder, as paths in it."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    """Files of ours that hold something else by now."""
    listed: bool = True
    """Whether the export says which files it wrote; else what it did not is known by the name alone."""


def foreign_in(folder: Path) -> Foreign:
    """What was added to an exported folder and what was changed in it; raises `Refused` when it is none of ours."""
    if not (folder / FACTS).is_file():
        raise Refused(
            f"{folder}: stands in the way and is no export of ours ({FACTS} is missing) - move it, or set --out"
        )
    facts = read_json(folder / FACTS)
    there = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    listed = facts.pop(FILES, None)
    if not isinstance(listed, Mapping):
        return Foreign(tuple(name for name in there if not UNLISTED.fullmatch(name)), (), listed=False)
    digests = {name: _digest(folder, name, facts) for name in there if name in listed}
    return Foreign(
        tuple(name for name in there if name not in listed),
        tuple(name for name, digest in digests.items() if digest != listed[name]),
    )


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `sollune.json` last of all, with the hash of each file that lies in the folder by then."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    recorded = json.loads(json.dumps(facts, default=str))
    listed = {name: _digest(folder, name, recorded) for name in [*names, FACTS]}
    text = json.dumps({**recorded, FILES: listed}, indent=2, sort_keys=True)
    (folder / FACTS).write_text(f"{text}\n", encoding="utf-8")


def _digest(folder: Path, name: str, facts: Mapping[str, Any]) -> str:
    """The hash of a file; of `sollune.json` that of the facts in it. A link is nobody's file."""
    if name == FACTS:
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / name
    return "a link" if path.is_symlink() else sha256(path)


def keep_added(earlier: Path, new: Path) -> None:
    """Take what was added to an earlier export over into the new one; raises `Refused` where both have a file."""
    if not earlier.exists():
        return
    foreign = foreign_in(earlier)
    for name in foreign.added:
        source, target = earlier / name, new / name
        if target.exists() or target.is_symlink():
            if not foreign.listed:
                continue
            raise Refused(f"{source}: is not ours, and the export writes a file of that name - {AWAY}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            link_or_copy(source, target)


AWAY = "move it away, or choose another folder with --out"


def refuse_changed(folder: Path) -> None:
    """Raise `Refused` with the names where files of an exported folder were changed since."""
    if (folder.exists() or folder.is_symlink()) and (changed := foreign_in(folder).changed):
        raise Refused(f"{folder}: {', '.join(changed)}: changed since the export wrote it - {AWAY}")


def refuse_foreign_file(file: Path) -> None:
    """Raise `Refused` unless a tensor file or a workflow that would be written over is as an export left it."""
    if not (file.exists() or file.is_symlink()) or is_ours(file):
        return
    raise Refused(f"{file}: is not as an export of ours wrote it, and would be written over - {AWAY}")


def is_ours(file: Path) -> bool:
    """Whether a file beside the diffusers folder is one of ours, unchanged."""
    if file.is_symlink() or not file.is_file():
        return False
    if file.suffix == ".json":
        return is_as_written(file.read_text(encoding="utf-8", errors="replace"))
    said = header(file)
    if "sollune.prediction" not in said or not tensorfile.is_sealed(said):
        return False
    with suppress(OSError):
        return tensorfile.hash_in(file) == said.get("modelspec.hash_sha256")
    return False


def header(file: Path) -> dict[str, str]:
    """The metadata of a tensor file; empty where it has none, or is no such file."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
