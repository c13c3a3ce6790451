"""What a user changes of a teacher: another autoencoder, merged LoRAs, a shorter text encoder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.system.refusal import Refused
from stages.teacher_files.assembly import Assembly
from stages.teacher_files.base import FILE_REMEDY, file_part, locate
from stages.teacher_files.checkpoint.kinds import contents_of
from stages.teacher_files.checkpoint.stored import LazyTensor
from stages.teacher_files.folder import MODEL_INDEX, file_digest, read_json
from stages.teacher_files.hub import SINGLE_FILE_SUFFIXES, HubRepository
from stages.teacher_files.lora import LoraMerge, open_loras
from stages.teacher_files.parts import Part, bare_part, folder_part, open_tensor_source
from stages.teacher_files.source import TeacherSource

TEXT_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")
DEFAULT_SCALING = 0.18215
"""Of diffusers, where a config says none."""
MERGED_COMPONENTS = ("unet", "text_encoder")


def apply_vae(source: TeacherSource, made: Assembly) -> None:
    """Put another autoencoder in the place of the teacher's; raises `Refused` for one of other latents."""
    if source.vae is None:
        return
    part = _other_vae(source.vae, made)
    own = read_json(made.configs / "vae" / "config.json").get("scaling_factor", DEFAULT_SCALING)
    scaling = part.config.get("scaling_factor", DEFAULT_SCALING)
    if part.config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise Refused(f"--teacher.vae: {source.vae}: is {part.config['_class_name']}, not AutoencoderKL - name another")
    if scaling != own:
        raise Refused(
            f"--teacher.vae: {source.vae}: its scaling_factor is {scaling}, the teacher's latents have {own} - "
            "name an autoencoder of the same latents"
        )
    made.put(part)


def _other_vae(location: str, made: Assembly) -> Part:
    place, subject = Path(location), f"--teacher.vae: {location}"
    if not place.exists() and place.suffix.lower() not in SINGLE_FILE_SUFFIXES:
        repository = HubRepository.open(location, "--teacher.vae")
        if "vae/config.json" in repository.names:
            place = repository.fetch_parts(["vae"])
        else:
            place = repository.fetch_bare_part("vae") or repository.fetch_file()
    elif not place.is_dir():
        place = locate(location, "--teacher.vae")
    if place.is_dir():
        if (place / "vae").is_dir() or (place / MODEL_INDEX).exists():
            return folder_part(place, "vae")
        return bare_part(place, "vae")
    contents = contents_of(open_tensor_source(place, subject, FILE_REMEDY), subject)
    if "vae" not in contents.groups:
        raise Refused(f"{subject}: holds no autoencoder - name a file or folder that has one")
    made.add_source("vae", place)
    return file_part(contents, "vae", made.configs, place, subject)


@dataclass(frozen=True)
class MergedTensor:
    """A weight with the differences of LoRAs, computed when it is needed."""

    key: str
    """`<component>.<diffusers' name>`"""
    source: LazyTensor
    merge: LoraMerge

    @property
    def dtype(self) -> torch.dtype:
        """fp32: a sum of half precision would lose most of a small difference."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.source.shape

    @property
    def file(self) -> Path:
        """The file of the weight."""
        return self.source.file

    def read(self) -> Tensor:
        """The weight with its differences."""
        return self.merge.merged(self.key, self.source.read()).float()


def apply_loras(source: TeacherSource, made: Assembly) -> None:
    """Merge LoRAs, in their order, into the parts that they change; raises `Refused` as `open_loras` does."""
    if not source.loras:
        return
    parts = {component: made.part(component).with_tensors() for component in MERGED_COMPONENTS}
    tensors = {c: {**(part.tensors or {}), **part.skipped} for c, part in parts.items()}
    shapes = {f"{c}.{name}": value.shape for c, held in tensors.items() for name, value in held.items()}
    merge = open_loras(source.loras, shapes, parts["unet"].config.get("layers_per_block", 2))
    applied = [[file_digest(Path(lora.file)), lora.scale] for lora in source.loras]
    for component in sorted(merge.components):
        part = parts[component]
        merged = {name: MergedTensor(f"{component}.{name}", value, merge) for name, value in tensors[component].items()}
        skipped = {name: merged.pop(name) for name in part.skipped}
        made.put(replace(part, tensors=merged, skipped=skipped, changes={**part.changes, "loras": applied}))
    for lora in source.loras:
        made.add_source("lora", Path(lora.file))


def apply_clip_skip(source: TeacherSource, made: Assembly) -> None:
    """Leave out the last layers of the text encoder, which are kept beside it; raises `Refused` for all of them."""
    if source.clip_skip == 0:
        return
    part = made.part("text_encoder").with_tensors()
    layers = part.config["num_hidden_layers"]
    if source.clip_skip >= layers:
        raise Refused(
            f"--teacher.clip-skip: {source.clip_skip}: the text encoder has {layers} layers - take less than {layers}"
        )
    left = layers - source.clip_skip
    kept, skipped = _split_layers(part.tensors or {}, left)
    changes = {**part.changes, "clip_skip": source.clip_skip}
    settings = {**part.settings, "num_hidden_layers": left}
    skipped = {**skipped, **part.skipped}
    made.put(replace(part, tensors=kept, skipped=skipped, settings=settings, changes=changes))


def _split_layers(tensors: Mapping[str, LazyTensor], left: int) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    kept: dict[str, Any] = {}
    skipped: dict[str, Any] = {}
    for name, value in tensors.items():
        layer = TEXT_LAYER.match(name)
        (skipped if layer and int(layer[1]) >= left else kept)[name] = value
    return kept, skipped
