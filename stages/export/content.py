"""What an export is meant to hold: every tensor of it in the type in which it is stored."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor
from transformers import CLIPTextModel

from configs.refusal import Refused
from stages.export.scheduler import scheduler_of
from stages.nets.loading import load_part
from stages.nets.student import Student

FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
HALF = "fp16"
"""diffusers' word for the variant in half precision."""


@dataclass(frozen=True)
class Content:
    """A student, what its teacher lends it, and the types in which both are written."""

    student: Student
    teacher_folder: Path
    types: Mapping[str, torch.dtype]
    """Variant -> type of its weights; the plain files' variant is the empty word."""
    flow_shift: float = 1.0

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler that must lie beside the weights."""
        return scheduler_of(self.student, self.teacher_folder, self.flow_shift)

    def tensors(self, part: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one part, by the names that its file has."""
        if part == "unet":
            return self.unet(dtype)
        lent = self.vae(dtype) if part == "vae" else self.text_encoder(dtype)
        weights: dict[str, Tensor] = lent.state_dict()
        return nested(weights) if part == "text_encoder" else weights

    def unet(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The student's tensors as they will be written; raises `Refused` for a value that the type cannot hold."""
        own = self.student.unet.state_dict()
        weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in own.items()}
        for name, value in weights.items():
            if not value.isfinite().all():
                way_out = "export with --dtype float32" if own[name].isfinite().all() else "choose another checkpoint"
                raise Refused(f"export: {name} holds values that are no numbers in {dtype} - {way_out}")
        return weights

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """The teacher's autoencoder."""
        vae: AutoencoderKL = load_part(self.teacher_folder, "vae", dtype)
        return vae

    def text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        """The teacher's text encoder."""
        text_encoder: CLIPTextModel = load_part(self.teacher_folder, "text_encoder", dtype)
        return text_encoder


def types_of(dtype: torch.dtype, half_variant: bool) -> dict[str, torch.dtype]:
    """The types of an export: of the plain files, and of the fp16 variant where one lies beside them."""
    return {"": dtype, **({HALF: torch.float16} if half_variant else {})}


def weight_file(part: str, variant: str = "") -> Path:
    """Where diffusers keeps a part's weights inside its folder."""
    return Path(part) / f"{FILES[part]}{f'.{variant}' if variant else ''}.safetensors"


def nested(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors under `text_model.`: names that every version of transformers reads (formats.md 1.4)."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}


def teachers_unet(teacher_folder: Path) -> dict[str, Tensor]:
    """The teacher's own tensors, in fp32."""
    weights: dict[str, Tensor] = load_part(teacher_folder, "unet", torch.float32).state_dict()
    return weights


def fingerprint(student: Student) -> str:
    """sha256 over the student's tensors in fp32, in the order of their names: the same whatever type they go out in."""
    sha = hashlib.sha256()
    for name, value in sorted(student.unet.state_dict().items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
