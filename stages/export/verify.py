"""The scheduler that lies in an export, and its settings as they are written and read back.

What an export is meant to hold: every tensor of it in the type in which it is stored.

Verification is part of exporting: both formats are read back from the disk and held against what they should be.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel

from stages.export import checks
from stages.nets.files import read_json
from stages.nets.loading import load_component
from stages.nets.scheduler import flow_scheduler, vp_scheduler
from stages.nets.student import Student
from stages.system.refusal import Refused

CONFIG_FILE = Path("scheduler") / "scheduler_config.json"


def make_scheduler(student: Student, teacher_folder: Path, flow_shift: float) -> SchedulerMixin:
    """The scheduler that samples what this student answers with."""
    return flow_scheduler(flow_shift) if student.vp_bridge is None else vp_scheduler(teacher_folder)


def config_to_write(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The scheduler's settings as its config file holds them, without the versions of programs."""
    return _without_versions(json.loads(scheduler.to_json_string()))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a folder's scheduler config, to be compared with `written_config`."""
    return _without_versions(read_json(folder / CONFIG_FILE))


def _without_versions(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_diffusers_version", "_use_default_values")}


WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
HALF_VARIANT = "fp16"
"""diffusers' word for the variant in half precision."""


@dataclass(frozen=True)
class ExportContent:
    """A student, what its teacher lends it, and the types in which both are written."""

    student: Student
    teacher_folder: Path
    dtypes: Mapping[str, torch.dtype]
    """Variant -> type of its weights; the plain files' variant is the empty word."""
    flow_shift: float = 1.0

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler that must lie beside the weights."""
        return make_scheduler(self.student, self.teacher_folder, self.flow_shift)

    def component_tensors(self, component: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one part, by the names that its file has."""
        if component == "unet":
            return self.unet_tensors(dtype)
        lent = self.load_vae(dtype) if component == "vae" else self.load_text_encoder(dtype)
        weights: dict[str, Tensor] = lent.state_dict()
        return with_text_model_prefix(weights) if component == "text_encoder" else weights

    def unet_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The student's tensors as they will be written; raises `Refused` for a value that the type cannot hold."""
        own = self.student.unet.state_dict()
        weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in own.items()}
        for name, value in weights.items():
            if not value.isfinite().all():
                way_out = "export with --dtype float32" if own[name].isfinite().all() else "choose another checkpoint"
                raise Refused(f"export: {name} holds values that are no numbers in {dtype} - {way_out}")
        return weights

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """The teacher's autoencoder."""
        vae: AutoencoderKL = load_component(self.teacher_folder, "vae", dtype)
        return vae

    def load_text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        """The teacher's text encoder."""
        text_encoder: CLIPTextModel = load_component(self.teacher_folder, "text_encoder", dtype)
        return text_encoder


def variant_dtypes(dtype: torch.dtype, half_variant: bool) -> dict[str, torch.dtype]:
    """The types of an export: of the plain files, and of the fp16 variant where one lies beside them."""
    return {"": dtype, **({HALF_VARIANT: torch.float16} if half_variant else {})}


def weight_file(component: str, variant: str = "") -> Path:
    """Where diffusers keeps a part's weights inside its folder."""
    return Path(component) / f"{WEIGHT_STEMS[component]}{f'.{variant}' if variant else ''}.safetensors"


def with_text_model_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors under `text_model.`: names that every version of transformers reads (formats.md 1.4)."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}


def load_teacher_unet(teacher_folder: Path) -> dict[str, Tensor]:
    """The teacher's own tensors, in fp32."""
    weights: dict[str, Tensor] = load_component(teacher_folder, "unet", torch.float32).state_dict()
    return weights


def student_digest(student: Student) -> str:
    """sha256 over the student's tensors in fp32, in the order of their names: the same whatever type they go out in."""
    sha = hashlib.sha256()
    for name, value in sorted(student.unet.state_dict().items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def verify_folder(folder: Path, content: ExportContent) -> None:
    """Raise `Refused` unless the diffusers folder is exactly this content; every file is read again."""
    checks.check_scheduler(str(CONFIG_FILE), read_config(folder), config_to_write(content.scheduler))
    teacher = load_teacher_unet(content.teacher_folder)
    checks.check_trained(content.student.unet.state_dict(), teacher)
    for variant, dtype in content.dtypes.items():
        for part in WEIGHT_STEMS:
            _verify_component(folder, content, part, variant, dtype, teacher if part == "unet" else {})
    del teacher  # 3.4 GB at SD-1.x's size
    for variant, dtype in content.dtypes.items():
        _verify_stock_pipeline(folder, content, variant, dtype)


def _verify_component(
    folder: Path,
    content: ExportContent,
    component: str,
    variant: str,
    dtype: torch.dtype,
    teacher: Mapping[str, Tensor],
) -> None:
    file = weight_file(component, variant)
    where, found, meant = str(file), read_tensors(folder / file), content.component_tensors(component, dtype)
    checks.check_names_and_shapes(where, found, meant)
    checks.check_dtype(where, found, dtype)
    checks.check_finite(where, found)
    checks.check_not_teacher(where, found, teacher)
    checks.check_equal(where, found, meant)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds; raises `Refused` where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{file}: cannot be read ({error}) - {checks.EXPORT_REMEDY}") from error


def _verify_stock_pipeline(folder: Path, content: ExportContent, variant: str, dtype: torch.dtype) -> None:
    """It must open the folder with the scheduler that lies there, and answer as the student does.

    In fp32, so that any processor can be asked.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, variant=variant or None, dtype=torch.float32)
    name, meant = type(pipeline.scheduler).__name__, type(content.scheduler).__name__
    if name != meant:
        raise Refused(f"{folder.name}: the stock pipeline opens it with {name}, not {meant} - {checks.EXPORT_REMEDY}")
    found = Student(pipeline.unet.eval(), content.student.vp_bridge)
    checks.check_velocities(str(weight_file("unet", variant)), found, content.student, dtype)
