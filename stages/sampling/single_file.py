"""Stock diffusers pipelines, of a diffusers folder or of one .safetensors file in the LDM layout."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stages.nets.loading import call_library, load_component, load_tokenizer, non_finite_reason
from stages.nets.student import TIME_SCALE
from stages.sampling.few_steps import FewSteps, folded_few_steps
from stages.system.refusal import Refused
from stages.system.text import plain_file_bytes
from stages.teacher_files.architecture import MAX_LAYERS, check_component_match, check_sd1_architecture
from stages.teacher_files.folder import read_json, refuse_pointer
from stages.teacher_files.parts import SKIPPED_FILE
from stages.teacher_files.variants import WEIGHT_FILES

BATCH_SIZE = 50
TEXT_LAYER = re.compile(r"(?:cond_stage_model\.transformer\.)?(?:text_model\.)?encoder\.layers\.(\d+)\.")
COMPONENT_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
"""Component -> prefix of the names of its tensors in the LDM layout."""
OPTIONAL_COMPONENTS = ("vae", "text_encoder")
"""Components that a file may leave to the folder: exports hold the UNet alone on request."""
EXPORT_METADATA = {"prediction": "velocity", "path": "linear", "time_scale": f"{TIME_SCALE:g}"}
"""Metadata of `sollune export`, behind `sollune.`, in a file that can be sampled."""


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """The folder's pipeline with the folder's own scheduler, in fp32 and without a safety checker."""
    check_component_match(folder)
    parts = {part: load_component(folder, part, torch.float32) for part in WEIGHT_FILES}
    parts["tokenizer"] = load_tokenizer(folder)
    pipeline = call_library(
        str(folder),
        folder,
        lambda: StableDiffusionPipeline.from_pretrained(
            folder, **parts, safety_checker=None, requires_safety_checker=False, local_files_only=True
        ),
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_ddim_scheduler(pipeline: StableDiffusionPipeline, teacher_folder: Path) -> None:
    """Make the pipeline sample like a noise model, by DDIM on the teacher's schedule."""
    pipeline.scheduler = DDIMScheduler.from_config(read_json(teacher_folder / "scheduler" / "scheduler_config.json"))


def generate_pictures(
    pipeline: StableDiffusionPipeline,
    texts: Sequence[str],
    noise: Float[Tensor, "b c h w"],
    steps: int,
    guidance: float,
) -> Float[Tensor, "b 3 H W"]:
    """Pictures in [0, 1], on the CPU."""
    pictures = []
    for first in range(0, len(texts), BATCH_SIZE):
        rows = slice(first, first + BATCH_SIZE)
        latents = generate_latents(pipeline, texts[rows], noise[rows], steps, guidance)
        pictures.append(decode_pictures(pipeline, latents))
    return torch.cat(pictures)


def generate_latents(
    pipeline: StableDiffusionPipeline,
    texts: Sequence[str],
    noise: Float[Tensor, "b c h w"],
    steps: int,
    guidance: float,
) -> Float[Tensor, "b c h w"]:
    """What the pipeline samples of one batch, before its autoencoder."""
    latents: Tensor = pipeline(
        list(texts),
        latents=noise.to(pipeline.device),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    return latents


@torch.no_grad()
def decode_pictures(pipeline: StableDiffusionPipeline, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """The pictures of one batch in [0, 1], on the CPU, exactly as the pipeline itself decodes them."""
    scaled = latents.to(pipeline.device) / pipeline.vae.config.scaling_factor
    decoded = pipeline.vae.decode(scaled, return_dict=False)[0]
    pictures: Tensor = pipeline.image_processor.postprocess(
        decoded, output_type="pt", do_denormalize=[True] * len(decoded)
    )
    return pictures.float().cpu()


@dataclass(frozen=True)
class SingleFile:
    """A file's metadata, and the components of a model that its tensors belong to."""

    path: Path
    metadata: Mapping[str, str]
    tensor_counts: Mapping[str, int]
    """Component -> how many tensors of it the file holds."""
    text_layers: int
    """Layers of the text encoder that it holds."""

    @property
    def clip_skip(self) -> int:
        """How many of them are left out when texts are read, as an export states it."""
        value = self.metadata.get("sollune.clip_skip", "0") if self.is_sollune_export else "0"
        if not value.isdecimal() or not 0 <= int(value) < max(self.text_layers, MAX_LAYERS):
            raise Refused(
                f"{self.path}: sollune.clip_skip is {value!r:.40}, not a number of layers - export the run again"
            )
        return int(value)

    @property
    def few_steps(self) -> FewSteps | None:
        """The steps and the one guidance scale of a student of few steps, as an export states them."""
        return folded_few_steps(self.metadata, str(self.path)) if self.is_sollune_export else None

    @property
    def is_sollune_export(self) -> bool:
        """Whether `sollune export` wrote it."""
        return "sollune.prediction" in self.metadata

    def flow_shift(self, configs: Path) -> float | None:
        """The shift of a model that predicts velocity; None for a teacher.

        An export holds its shift. For any other file the scheduler of `configs` decides, as in stock diffusers; raises
        `Refused` where the file's own metadata contradict it.
        """
        if self.is_sollune_export:
            value = self.metadata.get("sollune.shift", "nothing")
            return _valid_shift(value, f"{self.path}: sollune.shift is {value}", "export the run again")
        scheduler = read_json(configs / "scheduler" / "scheduler_config.json")
        if scheduler.get("prediction_type") != "flow_prediction":
            return None
        prediction = self.metadata.get("modelspec.prediction_type")
        if prediction in ("epsilon", "v"):
            raise Refused(
                f"{self.path}: its metadata say prediction {prediction}, and {configs} is a flow model - "
                "name with --config-from the diffusers folder of the model that this file was made from"
            )
        return scheduler_shift(scheduler, configs)


def scheduler_shift(scheduler: Mapping[str, Any], folder: Path) -> float:
    """The shift in a folder's scheduler config; raises `Refused` for a value that is none."""
    value = scheduler.get("flow_shift", 1.0)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    place = f"{folder}/scheduler: flow_shift is {value!r:.40}"
    return _valid_shift(value if is_number else "", place, "fetch the folder again")


def _valid_shift(value: str | float, place: str, hint: str) -> float:
    with suppress(ValueError, OverflowError):
        if 0 < (shift := float(value)) < math.inf:
            return shift
    raise Refused(f"{place}, not a number above 0 - {hint}")


def read_single_file(path: Path) -> SingleFile:
    """Read the header of a file; raises `Refused` for what is no whole SD-1.x model of a known prediction."""
    if path.suffix.lower() != ".safetensors":
        raise Refused(f"{path}: not a .safetensors file - other formats may run code when opened, so convert it first")
    plain_file_bytes(path, str(path), "export or fetch it again")
    refuse_pointer(path, str(path), "export or fetch it again")
    try:
        with safe_open(path, "pt") as opened:
            metadata, names = opened.metadata() or {}, list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path}: cannot be read ({error}) - export or fetch it again") from error
    owners = ((name, part) for name in names for part, prefix in COMPONENT_PREFIXES.items() if name.startswith(prefix))
    # The original autoencoders' files hold their training's loss as well.
    counts = Counter(part for name, part in owners if not name.startswith("first_stage_model.loss."))
    layers = {match[1] for name in names if (match := TEXT_LAYER.match(name))}
    file = SingleFile(path, metadata, counts, len(layers))
    if "unet" not in file.tensor_counts:
        raise Refused(
            f"{path}: holds no UNet in the LDM layout ({COMPONENT_PREFIXES['unet']}...) - name a whole model's file"
        )
    for key, value in EXPORT_METADATA.items():
        if file.is_sollune_export and (found := metadata.get(f"sollune.{key}")) != value:
            raise Refused(f"{path}: sollune.{key} is {found}, not {value} - sample its run instead")
    return file


def load_single_file(file: SingleFile, configs: Path, device: torch.device) -> StableDiffusionPipeline:
    """The stock pipeline of the file's weights, in fp32; sizes, tokenizer and missing components from `configs`.

    Raises `Refused` unless every tensor of every component is there, in the size that `configs` say.
    """
    check_sd1_architecture(configs, guidance_input=True)
    check_component_match(configs)
    tokenizer = load_tokenizer(configs)
    try:
        others = {
            part: load_component(configs, part, torch.float32)
            for part in OPTIONAL_COMPONENTS
            if part not in file.tensor_counts
        }
        with TemporaryDirectory(prefix="sollune-") as folder:
            link = Path(folder) / "model.safetensors"  # the library takes this ending alone
            link.symlink_to(file.path.resolve())
            source: dict[str, Any] = {"config": str(configs), "local_files_only": True}
            if read_json(configs / "unet" / "config.json").get("time_cond_proj_dim") is not None:
                # In this layout the guidance scale is no input of the network: it is folded into the weights.
                plain = {**source, "subfolder": "unet", "time_cond_proj_dim": None}
                others["unet"] = UNet2DConditionModel.from_single_file(str(link), dtype=torch.float32, **plain)
            pipeline = StableDiffusionPipeline.from_single_file(
                str(link), dtype=torch.float32, feature_extractor=None, tokenizer=tokenizer, **source, **others
            ).to(device)
    except NotImplementedError as error:  # raised by torch for a tensor without values
        raise Refused(f"{file.path}: lacks tensors that {configs} ask for - export or fetch it again") from error
    except (SingleFileComponentError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise Refused(
            f"{file.path}: not of the sizes in {configs} ({reason}) - name its own diffusers folder by --config-from"
        ) from error
    for part in COMPONENT_PREFIXES:
        _refuse_unused_tensors(file, part, getattr(pipeline, part), configs)
    _end_text_encoder_early(file, pipeline.text_encoder, configs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _end_text_encoder_early(file: SingleFile, text_encoder: Any, configs: Path) -> None:
    """Leave out the layers that the file's student was not trained with, where `configs` have them still."""
    if not (skip := file.clip_skip):
        return
    layers = getattr(text_encoder, "text_model", text_encoder).encoder.layers
    beside = configs / "text_encoder" / SKIPPED_FILE
    left_out = _layers_in(beside) if not file.text_layers and beside.is_file() else 0
    kept = (file.text_layers or len(layers) + left_out) - skip
    if not 0 < kept <= len(layers):
        raise Refused(
            f"{file.path}: was made with {kept} layers of the text encoder, {configs} has {len(layers)} - "
            "name its own diffusers folder by --config-from"
        )
    del layers[kept:]
    text_encoder.config.num_hidden_layers = kept


def _layers_in(file: Path) -> int:
    with safe_open(file, "pt") as opened:
        return len({match[1] for name in opened.keys() if (match := TEXT_LAYER.match(name))})  # noqa: SIM118


def _refuse_unused_tensors(file: SingleFile, component: str, module: nn.Module, configs: Path) -> None:
    """Raise `Refused` for tensors that diffusers left out of a component, and for values that are not finite."""
    if reason := non_finite_reason(module):
        raise Refused(f"{file.path}: {component}: {reason} - export or fetch it again")
    # A text encoder's file may hold more than is read of it: position_ids, and what CLIP itself needs.
    left_out = file.tensor_counts.get(component, 0) - len(module.state_dict())
    if component != "text_encoder" and left_out > 0:
        raise Refused(
            f"{file.path}: holds {left_out} tensors more of the {component} than {configs} know - "
            "name its own diffusers folder by --config-from"
        )
