"""The tensors of a file of torch.save, which stay on the disk; nothing that the file names is run (`unpickler`)."""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.system.refusal import Refused
from stages.system.text import plain_file_bytes
from stages.teacher_files.checkpoint.stored import StoredTensor, TensorFile
from stages.teacher_files.checkpoint.unpickler import Inert, PickleReader, View

MAX_PICKLE_BYTES = 1 << 28
"""Of the program alone, without tensors: that of a whole SD-1.x checkpoint has about a megabyte."""
MAX_DEPTH = 12
"""Of containers in one another, beyond which no tensors are looked for."""
MAX_PICKLED_DEPTH = 6 * MAX_DEPTH
"""The same in a pickle, where a module is an object with a dictionary of dictionaries."""
ZIP_HEAD, LOCAL_HEADER_BYTES = b"PK\x03\x04", 30
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PREFACE = 3
"""Pickles before the content: magic number, version, machine."""
READ_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, TypeError, AttributeError, LookupError,
    MemoryError, RecursionError, OverflowError, NotImplementedError, AssertionError, UnicodeError,
)  # fmt: skip
"""What a broken or hostile pickle makes the restricted reader raise."""


class NoTorchFileError(ValueError):
    """A file that torch.save did not write whole."""


@dataclass(frozen=True)
class PickledFile:
    """The content of a file of torch.save: containers and plain values, with tensors as `StoredTensor`."""

    content: Any
    foreign: tuple[str, ...]
    """Names of foreign classes and functions, each of which became an `Inert`."""


def read_pickled(path: Path, subject: str, remedy: str) -> PickledFile:
    """The content of a file of torch.save, of the zip format or of the one before, whose tensors stay on the disk.

    Raises `Refused`, beginning with `subject`, for anything else.
    """
    plain_file_bytes(path, subject, remedy)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(ZIP_HEAD)) == ZIP_HEAD
        return _read_zip(path) if is_zip else _read_legacy(path)
    except OSError as error:
        raise Refused(f"{subject} cannot be read ({error.strerror}) - {remedy}") from error
    except READ_ERRORS as error:
        reason = f" ({error})" if isinstance(error, NoTorchFileError) and str(error) else ""
        raise Refused(f"{subject} is no whole file of torch.save{reason} - {remedy}") from error


def _read_zip(path: Path) -> PickledFile:
    reader, size = PickleReader(), path.stat().st_size
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        entries = {info.filename: info for info in archive.infolist()}
        program = next((name for name in entries if name.rpartition("/")[2] == "data.pkl"), None)
        if program is None:
            raise NoTorchFileError("no data.pkl in it")
        if entries[program].file_size > MAX_PICKLE_BYTES:
            raise NoTorchFileError(f"its data.pkl has {entries[program].file_size:,} bytes")
        folder = program.removesuffix("data.pkl")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise NoTorchFileError("its numbers are big-endian")
        content = reader.load(io.BytesIO(archive.read(program)))
        places = {}
        for key, storage in reader.storages.items():
            info = entries[f"{folder}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED:
                raise NoTorchFileError("its tensors are compressed: unpack it and save it with torch.save")
            raw.seek(info.header_offset)
            header = raw.read(LOCAL_HEADER_BYTES)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            places[key] = info.header_offset + LOCAL_HEADER_BYTES + names
            held = min(info.file_size, size - places[key])
            if not header.startswith(ZIP_HEAD) or held < storage.elements * storage.dtype.itemsize:
                raise NoTorchFileError("it is cut")
    return PickledFile(_Placer(path, places).place(content), tuple(reader.foreign))


def _read_legacy(path: Path) -> PickledFile:
    """The format before torch 1.6: pickles, then each storage behind its number of elements."""
    reader, size = PickleReader(), path.stat().st_size
    with open(path, "rb") as file:
        preface = [reader.load(file) for _ in range(LEGACY_PREFACE)]
        if preface[0] != LEGACY_MAGIC:
            raise NoTorchFileError
        if not preface[2].get("little_endian", True):
            raise NoTorchFileError("its numbers are big-endian")
        content, keys, places = reader.load(file), reader.load(file), {}
        for key in keys:
            elements, storage = int.from_bytes(file.read(8), "little"), reader.storages[key]
            places[key] = file.tell()
            if elements != storage.elements:
                raise NoTorchFileError("it is cut")
            file.seek(elements * storage.dtype.itemsize, io.SEEK_CUR)
            if file.tell() > size:
                raise NoTorchFileError("it is cut")
    if missing := reader.storages.keys() - places.keys():
        raise NoTorchFileError(f"storage {min(missing)} is missing")
    return PickledFile(_Placer(path, places).place(content), tuple(reader.foreign))


@dataclass(frozen=True)
class _Placer:
    """Puts the tensors of a file in the place of the views in its content."""

    path: Path
    places: Mapping[str, int]
    """of each storage's first byte"""
    done: dict[int, Any] = field(default_factory=dict)
    """Containers by their identity: one may lie in many, and in itself."""

    def place(self, value: Any, depth: int = 0) -> Any:
        """The value with each view as a tensor of the file; a foreign object as the state that it holds."""
        if isinstance(value, View):
            begin = self.places[value.storage.key] + value.offset * value.dtype.itemsize
            return StoredTensor(self.path, value.dtype, value.shape, value.stride, begin)
        if isinstance(value, str | bytes | int | float | bool | None):
            return value
        if depth > MAX_PICKLED_DEPTH:
            return None
        if id(value) not in self.done:
            self.done[id(value)] = None
            self.done[id(value)] = self._place_container(value, depth + 1)
        return self.done[id(value)]

    def _place_container(self, value: Any, depth: int) -> Any:
        match value:
            case Inert() if isinstance(value.state, dict):
                return self._place_state(value.state, depth)
            case dict():
                return {_plain_key(key): self.place(item, depth) for key, item in value.items()}
            case list() | tuple():
                return [self.place(item, depth) for item in value]
        return None

    def _place_state(self, state: dict[Any, Any], depth: int) -> dict[str, Any]:
        """The state of a foreign object; of a whole module of torch, its tensors by their names."""
        placed: dict[str, Any] = self.place(state, depth) or {}
        if not {"_modules", "_parameters"} <= placed.keys():
            return placed
        groups = [placed.get(group) or {} for group in ("_parameters", "_buffers", "_modules")]
        return {name: value for group in groups if isinstance(group, dict) for name, value in group.items()}


def _plain_key(key: Any) -> Any:
    return key if isinstance(key, str | int | float | bool | None) else str(type(key).__name__)


def tensors_of(path: Path, pickled: PickledFile) -> TensorFile:
    """The tensors of a checkpoint by name, out of the containers that trainers put round them."""
    found = dict(_named_tensors(_state_dict(pickled.content)))
    return TensorFile(path, found, {}, pickled.foreign)


STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "unet", "ema", "weights")
"""Under which trainers keep the weights, the likelier first."""


def _state_dict(content: Any) -> Any:
    """The dictionary of tensors in a checkpoint: under one of `STATE_KEYS`, or the content itself."""
    for _ in range(MAX_DEPTH):
        if not isinstance(content, dict) or any(isinstance(value, StoredTensor) for value in content.values()):
            break
        inner = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None or not any(True for _ in _named_tensors(inner)):
            break
        content = inner
    return content


def _named_tensors(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, StoredTensor]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if isinstance(value, StoredTensor):
            yield f"{prefix}{key}", value
        elif depth < MAX_DEPTH:
            yield from _named_tensors(value, f"{prefix}{key}.", depth + 1)
