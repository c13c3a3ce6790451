"""The parts that a composed teacher is made of: files that are linked as they lie, or tensors that are written."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.system.refusal import Refused
from stages.system.text import plain_file_bytes
from stages.teacher_files.checkpoint.pickled import read_pickled, tensors_of
from stages.teacher_files.checkpoint.stored import (
    LazyTensor,
    TensorFile,
    is_safetensors,
    read_safetensors,
    safetensors_bytes,
    write_safetensors,
)
from stages.teacher_files.folder import (
    FETCH_REMEDY,
    component_files,
    digest_files,
    file_digest,
    link_name,
    part_files,
    read_json,
    refuse_pointer,
)
from stages.teacher_files.variants import WEIGHT_FILES

CONFIG_NAMES = {"scheduler": "scheduler_config.json"}
SKIPPED_FILE = "skipped_layers.safetensors"
"""The layers of a text encoder that clip skip leaves out; no loader reads it."""


@dataclass(frozen=True)
class Part:
    """One component of a teacher, and what makes it another than its files."""

    component: str
    files: tuple[Path, ...]
    """of a diffusers folder: linked unless changed; of a component from a single file the config alone"""
    base_digest: str
    """sha256 over its source files"""
    tensors: Mapping[str, LazyTensor] | None = None
    """by diffusers' names; None for a part that is linked"""
    skipped: Mapping[str, LazyTensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """entries of its config that are other than in the file"""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """the options that change it, as the identity holds them"""
    read_files: tuple[Path, ...] = ()
    """of a diffusers folder, whose tensors these are"""

    @property
    def place(self) -> Path:
        """The folder of its config, which messages name."""
        return self.config_file.parent

    @property
    def digest(self) -> str:
        """Its identity: the contents of its source files, and the options that change it."""
        return digest_of([self.base_digest, dict(self.changes)]) if self.changes else self.base_digest

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files of a diffusers folder that its weights come from."""
        files = (*self.files, *self.read_files) if self.component in WEIGHT_FILES else ()
        return tuple(file for file in files if file != self.config_file)

    @property
    def config_file(self) -> Path:
        """The config among its files."""
        name = CONFIG_NAMES.get(self.component, "config.json")
        return next(file for file in self.files if file.name == name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config as it will be."""
        return {**read_json(self.config_file), **self.settings}

    def with_tensors(self) -> "Part":
        """The same, to be written tensor by tensor; raises `Refused` for weights that are not whole."""
        if self.tensors is not None:
            return self
        tensors = dict(_stored_weights(self.component, self.files))
        return replace(self, files=(self.config_file,), tensors=tensors, read_files=self.files)

    def size_bytes(self) -> int:
        """About how many bytes are written for it."""
        return safetensors_bytes({**(self.tensors or {}), **{f"skipped.{name}": v for name, v in self.skipped.items()}})

    def write(self, folder: Path) -> None:
        """Write its files into a new folder; files that are as they were become links."""
        folder.mkdir()
        for file in self.files:
            target = folder / link_name(self.component, file)
            if self.settings and file == self.config_file:
                target.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            else:
                target.symlink_to(file.resolve())
        if self.tensors is not None:
            write_safetensors(folder / WEIGHT_FILES[self.component][0], self.tensors)
        if self.skipped:
            write_safetensors(folder / SKIPPED_FILE, self.skipped)


def digest_of(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def bare_part(folder: Path, component: str) -> Part:
    """A component that lies alone in a folder, its config beside its weights."""
    files = tuple(part_files(folder, component))
    return Part(component, files, digest_files(files))


def folder_part(folder: Path, component: str) -> Part:
    """A component of a diffusers folder as it lies there, with the layers that an earlier clip skip left out."""
    files = tuple(component_files(folder, component))
    beside = folder / component / SKIPPED_FILE
    skipped: Mapping[str, LazyTensor] = {}
    if component == "text_encoder" and beside.is_file():
        skipped = read_safetensors(beside, f"teacher: {beside}", FETCH_REMEDY).tensors
    return Part(component, files, digest_files(files), skipped=skipped)


def single_file_digest(file: Path, config: Path, taken: str) -> str:
    """The identity of a component that comes of a single file: its content, the config's, and which of its weights."""
    return digest_of({"weights": file_digest(file), "config": file_digest(config), "taken": taken})


def open_tensor_source(path: Path, subject: str, remedy: str = FETCH_REMEDY) -> TensorFile:
    """The tensors of a file, whose beginning says its format; raises `Refused`, beginning with `subject`."""
    plain_file_bytes(path, subject, remedy)  # reading from a pipe would wait for ever
    refuse_pointer(path, subject, remedy)
    if path.suffix.lower() == ".safetensors" or is_safetensors(path):
        return read_safetensors(path, subject, remedy)
    return tensors_of(path, read_pickled(path, subject, remedy))


def _stored_weights(component: str, files: tuple[Path, ...]) -> Iterator[tuple[str, LazyTensor]]:
    names: dict[str, Path] = {}
    for file in files:
        if file.suffix == ".json":
            continue
        for name, tensor in open_tensor_source(file, f"teacher: {file}").tensors.items():
            if name in names:
                raise Refused(f"teacher: {file}: tensor {name} is in {names[name].name} too - {FETCH_REMEDY}")
            names[name] = file
            if not name.endswith("position_ids"):
                yield name, tensor
