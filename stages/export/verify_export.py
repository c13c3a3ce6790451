"""What an exported diffusers folder must hold, and the check of one on the disk, which is part of every export."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.values import Strict
from stages.export import checks
from stages.export.tensorfile import tensor_bytes
from stages.nets.loading import load_component
from stages.nets.scheduler import flow_scheduler, vp_scheduler, window_scheduler
from stages.nets.student import Student
from stages.nets.student_shape import prune_of, prune_unet
from stages.sampling.fields import DEFAULT_GUIDANCE
from stages.system.refusal import Refused
from stages.teacher_files.folder import read_json
from stages.teacher_files.parts import SKIPPED_FILE

SKIPPED_LAYERS_FILE = Path("text_encoder") / SKIPPED_FILE
"""The layers that clip skip leaves out, in a folder whose text encoder ends early.

No pipeline reads them; they make the single file's text encoder whole.
"""
TEXT_LAYER = re.compile(r"\bencoder\.layers\.(\d+)\.")
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
HALF_VARIANT = "fp16"
"""diffusers' word for the variant in half precision."""
DTYPES = {"float16": torch.float16, "float32": torch.float32, "both": torch.float32}
"""Of the plain files; `both` adds the half variant."""


class ExportOptions(Strict):
    """How a student is exported."""

    dtype: Literal["float16", "float32", "both"] = Field(
        "float16",
        description="type of the weights; both: fp32 files with their fp16 variant beside them, and a single file in "
        "fp16",
    )
    flow_shift: float = Field(
        1.0, gt=0, description="shift of the sampling grid written into the scheduler, a pure number"
    )
    name: str | None = Field(
        None,
        pattern=r"^\w[\w.-]*$",
        description="what stands before -flow.safetensors; none takes the teacher's name, with -classes for a model "
        "fine-tuned on classes",
    )
    single_file: bool | None = Field(
        None,
        description="write NAME-flow.safetensors and a ComfyUI workflow beside diffusers/; none writes them for a "
        "student that predicts velocity",
    )
    unet_only: bool = Field(
        False, description="let the single file hold the UNet alone, as NAME-unet-flow.safetensors for UNETLoader"
    )
    fold: tuple[float, ...] = Field(
        (),
        description="guidance scales of a student of few steps, each of which gets a single file with that scale in "
        f"its weights; none takes {DEFAULT_GUIDANCE:g}, or the nearest that the student learnt",
    )


DEFAULT_OPTIONS = ExportOptions()


@dataclass(frozen=True)
class ExportContent:
    """A student, its teacher, whose other components it keeps, and the options of the export."""

    student: Student
    teacher_folder: Path
    options: ExportOptions

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Variant -> type of its weights; the plain files' variant is the empty word."""
        half = {HALF_VARIANT: torch.float16} if self.options.dtype == "both" else {}
        return {"": DTYPES[self.options.dtype], **half}

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler that samples what the student predicts."""
        if self.student.embeds_guidance:
            return window_scheduler()
        if self.student.vp_bridge is None:
            return flow_scheduler(self.options.flow_shift)
        return vp_scheduler(self.teacher_folder)

    @cached_property
    def teacher_components(self) -> dict[str, Any]:
        """The teacher's autoencoder and text encoder, which the export takes over, in fp32."""
        return {name: load_component(self.teacher_folder, name, torch.float32) for name in ("vae", "text_encoder")}

    @cached_property
    def skipped_layers(self) -> dict[str, Tensor]:
        """The tensors of the layers that the teacher's text encoder leaves out, as stored; empty without clip skip."""
        file = self.teacher_folder / SKIPPED_LAYERS_FILE
        return with_text_model_prefix(read_tensors(file)) if file.is_file() else {}

    def skipped_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same in the type of an export."""
        return {name: value.to(dtype).contiguous() for name, value in self.skipped_layers.items()}

    @property
    def clip_skip(self) -> int:
        """How many layers of the text encoder are left out."""
        return len({match[1] for name in self.skipped_layers if (match := TEXT_LAYER.search(name))})

    def teacher_tensors(self) -> dict[str, Tensor]:
        """What the student's tensors began as, in fp32 and by their names in the student."""
        unet = load_component(self.teacher_folder, "unet", torch.float32)
        return dict(prune_unet(unet, prune_of(unet.config, self.student.unet.config)).state_dict())

    def component_tensors(self, component: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one component, by the names in its file."""
        if component == "unet":
            return self.unet_tensors(dtype)
        weights = {name: value.to(dtype) for name, value in self.teacher_components[component].state_dict().items()}
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


def weight_file(component: str, variant: str = "") -> Path:
    """Where diffusers keeps a component's weights inside its folder."""
    return Path(component) / f"{WEIGHT_STEMS[component]}{f'.{variant}' if variant else ''}.safetensors"


def with_text_model_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors under `text_model.`: names that every version of transformers reads (formats.md 1.4)."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}


def student_digest(student: Student) -> str:
    """sha256 over the names and tensors of the student in fp32: the same for each type it is exported in."""
    sha = hashlib.sha256()
    for name, value in sorted(student.unet.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor_bytes(value.detach().cpu().float()))
    return sha.hexdigest()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds; raises `Refused` where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{file}: cannot be read ({error}) - {checks.EXPORT_REMEDY}") from error


def verify_folder(folder: Path, content: ExportContent) -> None:
    """Raise `Refused` unless the diffusers folder is exactly this content; every file is read again."""
    expected = json.loads(content.scheduler.to_json_string())
    checks.check_scheduler(
        str(SCHEDULER_FILE), _without_versions(read_json(folder / SCHEDULER_FILE)), _without_versions(expected)
    )
    teacher = content.teacher_tensors()
    checks.check_trained(content.student.unet.state_dict(), teacher)
    for variant, dtype in content.dtypes.items():
        for component in WEIGHT_STEMS:
            file = weight_file(component, variant)
            tensors = read_tensors(folder / file)
            if component == "unet":
                checks.check_not_teacher(str(file), tensors, teacher)
            checks.check_values(str(file), tensors, dtype)
            checks.check_equal(str(file), tensors, content.component_tensors(component, dtype))
    _verify_skipped_layers(folder, content)
    del teacher, tensors  # 3.4 GB at SD-1.x's size
    for variant, dtype in content.dtypes.items():
        _verify_stock_pipeline(folder, content, variant, dtype)


def _verify_skipped_layers(folder: Path, content: ExportContent) -> None:
    """The layers of clip skip must be beside the text encoder, where there are any, and nowhere else."""
    file, dtype = folder / SKIPPED_LAYERS_FILE, content.dtypes[""]
    found = read_tensors(file) if file.is_file() else {}
    checks.check_values(str(SKIPPED_LAYERS_FILE), found, dtype)
    checks.check_equal(str(SKIPPED_LAYERS_FILE), found, content.skipped_tensors(dtype))


def _verify_stock_pipeline(folder: Path, content: ExportContent, variant: str, dtype: torch.dtype) -> None:
    """It must open the folder with its own scheduler, and predict what the student does.

    In fp32, which every processor can compute in.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, variant=variant or None, dtype=torch.float32)
    name, expected = type(pipeline.scheduler).__name__, type(content.scheduler).__name__
    if name != expected:
        message = f"{folder.name}: the stock pipeline opens it with {name}, not {expected}"
        raise Refused(f"{message} - {checks.EXPORT_REMEDY}")
    loaded = Student(pipeline.unet.eval(), content.student.vp_bridge)
    checks.check_velocities(str(weight_file("unet", variant)), loaded, content.student, dtype)


def _without_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_diffusers_version", "_use_default_values")}
