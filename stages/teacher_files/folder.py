"""Which files of a diffusers folder are read, and its identity: sha256 over exactly these files."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from os.path import lexists  # true for a dangling link, so that it is refused and not passed over
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.system.refusal import Refused
from stages.system.text import parse_json, plain_file_bytes, read_bytes
from stages.teacher_files.variants import WEIGHT_FILES, choose_weights, plain_name

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
LEGACY_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json")
"""Read only where tokenizer_config.json does not hold the tokens themselves."""
MODEL_INDEX = "model_index.json"
COMPONENT_NAMES = (*WEIGHT_FILES, "tokenizer", "scheduler")
MAX_CONFIG_BYTES = 1 << 26
"""Of a JSON file: the largest is a vocabulary, of about a megabyte."""
LFS_POINTER_HEAD = b"version https://git-lfs"
FETCH_REMEDY = "fetch the folder again"
LEGACY_DIGEST_SUFFIXES = {".json", ".txt", ".safetensors"}
"""Recipes used to hold a digest of every file of a part with one of these endings, read or not."""
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The types of weights, as safetensors names them."""


def broken_model(problem: str) -> Refused:
    """The refusal of a model folder that is damaged or incomplete."""
    return Refused(f"teacher: {problem} - {FETCH_REMEDY}")


def read_json(path: Path) -> dict[str, Any]:
    """A component's config; raises `Refused` with the file's name unless it is one JSON object of finite numbers."""
    if not lexists(path):
        raise Refused(f"teacher: {path} is missing - the folder must be a whole diffusers model")
    try:
        content: Any = parse_json(read_bytes(path, f"teacher: {path}", FETCH_REMEDY, MAX_CONFIG_BYTES).decode("utf-8"))
    except ValueError as error:
        raise broken_model(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise broken_model(f"{path} holds {_type_text(content)}, not the settings of a model")
    return content


def component_files(folder: Path, component: str) -> list[Path]:
    """The files of one part that are read; raises `Refused` where one is missing, empty or unreadable."""
    where = folder / component
    if component in WEIGHT_FILES:
        return part_files(where, component, _names_by_part(folder))
    return _checked(_tokenizer_files(where) if component == "tokenizer" else [where / "scheduler_config.json"])


def part_files(where: Path, part: str, names_by_part: Mapping[str, Sequence[str]] | None = None) -> list[Path]:
    """The config and the weights that are read of a part that lies in a folder; raises `Refused` as above.

    `names_by_part` are the files of all parts of its model, which share a variant where they can.
    """
    return _checked([where / "config.json", *_weight_files(where, part, names_by_part or {part: _names(where)})])


def _checked(files: list[Path]) -> list[Path]:
    for file in files:
        _check_file(file)
    return files


@contextmanager
def linked_folder(files: Sequence[Path], component: str = "") -> Iterator[Path]:
    """A temporary folder of links to these files alone, so that a library cannot read any other.

    Weights of a `component` that are a variant have the plain name there.
    """
    with TemporaryDirectory(prefix="sollune-") as folder:
        for file in files:
            (Path(folder) / link_name(component, file)).symlink_to(file.resolve())
        yield Path(folder)


def link_name(component: str, file: Path) -> str:
    """The name under which a file of a component is read without naming its variant."""
    return plain_name(component, file.name) if component in WEIGHT_FILES else file.name


def weight_variants(folder: Path) -> dict[str, str]:
    """Part -> the variant of the weights that are read; empty for plain ones."""
    return {part: file.variant for part, file in choose_weights(_names_by_part(folder)).items()}


def _tokenizer_files(folder: Path) -> list[Path]:
    present = [folder / name for name in TOKENIZER_FILES if lexists(folder / name)]
    names = {file.name for file in present}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise broken_model(f"{folder}: has no words (tokenizer.json, or vocab.json and merges.txt)")
    config = folder / "tokenizer_config.json"
    if not lexists(config) or "added_tokens_decoder" not in read_json(config):
        present += [folder / name for name in LEGACY_TOKENIZER_FILES if lexists(folder / name)]
    return present


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def _names_by_part(folder: Path) -> dict[str, list[str]]:
    return {part: _names(folder / part) for part in WEIGHT_FILES}


def _weight_files(where: Path, part: str, names_by_part: Mapping[str, Sequence[str]]) -> list[Path]:
    chosen = choose_weights(names_by_part).get(part)
    if chosen is not None:
        file = where / chosen.name
        return [file, *(where / name for name in shard_names(file))] if file.suffix == ".json" else [file]
    others = [name for name in names_by_part.get(part, ()) if Path(name).suffix in {".safetensors", ".bin"}]
    beside = f"; there is {', '.join(others)}, which is not read under that name" if others else ""
    rename = "rename the one that is meant, or " if others else ""
    known = " or ".join(WEIGHT_FILES[part])
    raise Refused(f"teacher: {where}: no weights ({known}{beside}) - {rename}{FETCH_REMEDY}")


def shard_names(index: Path) -> list[str]:
    """The names of the shards that an index lists; raises `Refused` for a broken one."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise broken_model(f"{index}: weight_map is {_type_text(listed)}, it should list the shards")
    names = listed.values()
    if bad := next((name for name in names if not isinstance(name, str) or Path(name).name != name), None):
        raise broken_model(f"{index}: {bad!r} is no file of this folder")
    return sorted(set(names))


def _check_file(file: Path) -> None:
    """Raise `Refused` unless the file is there and its head is of the kind that its name promises."""
    if not lexists(file):
        raise broken_model(f"{file} is missing")
    plain_file_bytes(file, f"teacher: {file}", FETCH_REMEDY)  # reading from a pipe would wait for ever
    refuse_pointer(file, f"teacher: {file}", FETCH_REMEDY)
    if file.suffix == ".safetensors":
        _check_header(file)


def refuse_pointer(file: Path, subject: str, remedy: str) -> None:
    """Raise `Refused`, beginning with `subject`, for a file that is empty, unreadable, or a pointer of Git LFS."""
    try:
        with open(file, "rb") as handle:
            head = handle.read(len(LFS_POINTER_HEAD))
    except OSError as error:
        raise Refused(f"{subject} cannot be read ({error.strerror}) - {remedy}") from error
    if not head:
        raise Refused(f"{subject} is empty - {remedy}")
    if head == LFS_POINTER_HEAD:
        raise Refused(f"{subject} is a pointer of Git LFS, not the file itself - run git lfs pull there")


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, "pt") as tensors:
            types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise broken_model(f"{file} is not a whole safetensors file ({error})") from error
    for name, kind in types.items():
        if kind not in FLOAT_TYPES and not name.endswith("position_ids"):
            raise broken_model(f"{file}: tensor {name} is of type {kind}, weights are floating")


def _type_text(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def component_digests(folder: Path) -> dict[str, str]:
    """Component -> sha256 over the names and contents of the files that are read, never over the folder's path."""
    return {part: digest_files(component_files(folder, part)) for part in COMPONENT_NAMES}


def digests_as_recorded(recorded: object, folder: Path) -> dict[str, str]:
    """The digests of a teacher, of unchanged components as an earlier recipe recorded them.

    Raises `Refused` as `changed_components` does.
    """
    now = component_digests(folder)
    if not isinstance(recorded, Mapping):
        return now
    changed = changed_components(recorded, folder)
    return {part: sha256 if part in changed else recorded.get(part, sha256) for part, sha256 in now.items()}


def changed_components(recorded: Mapping[str, str], folder: Path) -> list[str]:
    """The components that match a recipe's digest neither by today's rule nor by the earlier one.

    Raises `Refused` where the earlier rule left out the weights that are read.
    """
    now, changed = component_digests(folder), []
    for part, sha256 in recorded.items():
        if sha256 == now.get(part):
            continue
        if part not in now or sha256 != _legacy_digest(folder / part):
            changed.append(part)
        elif left_out := [file for file in component_files(folder, part) if file.suffix not in LEGACY_DIGEST_SUFFIXES]:
            raise Refused(
                f"teacher: {left_out[0]}: was no part of a teacher's identity when this cache was made, so it may be "
                "another by now - make the cache again in a new run folder"
            )
    return changed


def digest_files(files: Sequence[Path]) -> str:
    """sha256 over the names and contents of files."""
    sha = hashlib.sha256()
    for file in sorted(files):
        state = file.stat()
        sha.update(file.name.encode())
        sha.update(_file_digest(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ino))
    return sha.hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file's content, in hex, read once as long as the file stays the same."""
    state = file.stat()
    return _file_digest(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ino).hex()


def _legacy_digest(component_folder: Path) -> str:
    files = [path for path in component_folder.iterdir() if path.suffix in LEGACY_DIGEST_SUFFIXES and path.is_file()]
    return digest_files(files)


@lru_cache(maxsize=256)
def _file_digest(file: Path, _size: int, _mtime_ns: int, _inode: int) -> bytes:
    """sha256 of a file, read once as long as it stays the same: a teacher's weights are gigabytes."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
