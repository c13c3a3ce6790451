"""Where a model lies, and which files of its folder are read: these and no others make it what it is."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from configs.json_text import parse_json
from configs.refusal import Refused
from configs.text import read_bytes, size_of

WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
}
"""Part -> its weights: the first file that is there is read, whole or in the shards that `<name>.index.json` lists."""
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
LEGACY_TOKENS = ("special_tokens_map.json", "added_tokens.json")
"""Read only where tokenizer_config.json does not hold the tokens themselves."""
INDEX = "model_index.json"
PARTS = (*WEIGHTS, "tokenizer", "scheduler")
CONFIGS = ("*.json", "*.txt")
FILES = (*CONFIGS, "README.md", "LICENSE*", *(f"{part}/*.safetensors" for part in WEIGHTS))
MOST_CONFIG_BYTES = 1 << 26
"""Of a JSON file: the largest is a vocabulary, of about a megabyte."""
POINTER = b"version https://git-lfs"
AGAIN = "fetch the folder again"
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""What safetensors calls the types that weights come in."""


def locate(location: str, files: Sequence[str] = FILES) -> Path:
    """The local folder of a model: the folder itself, or a snapshot of these files of the hub repository."""
    if Path(location).is_dir():
        return Path(location)
    try:
        folder = Path(snapshot_download(location, allow_patterns=list(files)))
        if pickled := _pickled_patterns(folder) if files is FILES else []:
            folder = Path(snapshot_download(location, allow_patterns=[*files, *pickled]))
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise Refused(
            f"teacher: {location!r} is neither a folder nor a hub repository that can be reached - "
            "name a diffusers folder of an SD-1.x model"
        ) from error


def _pickled_patterns(folder: Path) -> list[str]:
    """Where the older weights of a hub repository lie, of the parts that have no others; what variants are is left."""
    patterns = []
    for part, names in WEIGHTS.items():
        if not any((folder / part).glob("*.safetensors")):
            patterns += [f"{part}/{names[1]}", f"{part}/{names[1].removesuffix('.bin')}-*-of-*.bin"]
    return patterns


def absolute(location: str) -> str | None:
    """A folder's place on this machine, from wherever a command is started; None for a hub id."""
    return str(Path(location).absolute()) if Path(location).is_dir() else None


def find(places: Sequence[str]) -> tuple[str, Path]:
    """Name and folder of a teacher that was named before: the first place where a model lies, or its hub repository.

    Raises `Refused` when it lies in none of them any more.
    """
    for place in places:
        if (Path(place) / INDEX).is_file():
            return place, Path(place)
    try:
        return places[0], locate(places[0])
    except Refused as refusal:
        gone = " or ".join(map(repr, dict.fromkeys(places)))
        raise Refused(
            f"teacher: {gone}: no model lies there any more, and no hub repository that can be reached is called so - "
            "say where it lies now with --teacher"
        ) from refusal


def read_json(path: Path) -> dict[str, Any]:
    """A component's config; raises `Refused` with the file's name unless it is one JSON object of finite numbers."""
    if not _lies(path):
        raise Refused(f"teacher: {path} is missing - the folder must be a whole diffusers model")
    try:
        content: Any = parse_json(read_bytes(path, f"teacher: {path}", AGAIN, MOST_CONFIG_BYTES).decode("utf-8"))
    except ValueError as error:
        raise Refused(f"teacher: {path} is not JSON ({error}) - {AGAIN}") from error
    if not isinstance(content, dict):
        raise Refused(f"teacher: {path} holds {_kind(content)}, not the settings of a model - {AGAIN}")
    return content


def files_of(folder: Path, part: str) -> list[Path]:
    """The files of one part that are read; raises `Refused` where one is missing, empty or unreadable."""
    where = folder / part
    if part == "scheduler":
        files = [where / "scheduler_config.json"]
    elif part == "tokenizer":
        files = _tokenizer(where)
    else:
        files = [where / "config.json", *_weights(where, WEIGHTS[part])]
    for file in files:
        _check(file)
    return files


@contextmanager
def alone(files: Sequence[Path]) -> Iterator[Path]:
    """A folder of links to these files, so that a library that is given it cannot read any other."""
    with TemporaryDirectory(prefix="sollune-") as folder:
        for file in files:
            (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _tokenizer(where: Path) -> list[Path]:
    present = [where / name for name in TOKENIZER if _lies(where / name)]
    names = {file.name for file in present}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise Refused(f"teacher: {where}: has no words (tokenizer.json, or vocab.json and merges.txt) - {AGAIN}")
    config = where / "tokenizer_config.json"
    if not _lies(config) or "added_tokens_decoder" not in read_json(config):
        present += [where / name for name in LEGACY_TOKENS if _lies(where / name)]
    return present


def _weights(where: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        whole, index = where / name, where / f"{name}.index.json"
        if _lies(whole):
            return [whole]
        if _lies(index):
            return [index, *_shards(index)]
    others = sorted(file.name for file in where.glob("*") if file.suffix in {".safetensors", ".bin"})
    beside = f"; there is {', '.join(others)}, which is not read under that name" if others else ""
    rename = "rename the one that is meant, or " if others else ""
    raise Refused(f"teacher: {where}: no weights ({' or '.join(names)}{beside}) - {rename}{AGAIN}")


def _lies(file: Path) -> bool:
    """Whether something of this name lies there: what is no file, such as a link to nothing, is refused, not passed."""
    return os.path.lexists(file)


def _shards(index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise Refused(f"teacher: {index}: weight_map is {_kind(listed)}, it should list the shards - {AGAIN}")
    names = listed.values()
    if bad := next((name for name in names if not isinstance(name, str) or Path(name).name != name), None):
        raise Refused(f"teacher: {index}: {bad!r} is no file of this folder - {AGAIN}")
    return sorted({index.parent / name for name in names})


def _check(file: Path) -> None:
    """Raise `Refused` unless the file is there and is what its name says, as far as its head tells."""
    if not _lies(file):
        raise Refused(f"teacher: {file} is missing - {AGAIN}")
    size_of(file, f"teacher: {file}", AGAIN)  # which a pipe has not: reading from it would wait for ever
    try:
        with open(file, "rb") as handle:
            head = handle.read(len(POINTER))
    except OSError as error:
        raise Refused(f"teacher: {file} cannot be read ({error.strerror}) - {AGAIN}") from error
    if not head:
        raise Refused(f"teacher: {file} is empty - {AGAIN}")
    if head == POINTER:
        raise Refused(f"teacher: {file} is a pointer of Git LFS, not the file itself - run git lfs pull there")
    if file.suffix == ".safetensors":
        _check_header(file)


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, "pt") as tensors:
            types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise Refused(f"teacher: {file} is not a whole safetensors file ({error}) - {AGAIN}") from error
    for name, kind in types.items():
        if kind not in FLOATS and not name.endswith("position_ids"):
            raise Refused(f"teacher: {file}: tensor {name} is of type {kind}, weights are floating - {AGAIN}")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
