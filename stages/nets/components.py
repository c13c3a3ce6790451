"""The parts of a Stable Diffusion 1.x model, loaded from a diffusers folder or hub id and checked before use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stages.flow.schedule import NoiseSchedule
from stages.nets.loading import call_library, load_component, load_tokenizer
from stages.nets.tokens import PROBE_SENTENCE
from stages.teacher_files.architecture import check_component_match, check_sd1_architecture
from stages.teacher_files.folder import WEIGHT_FILES, broken_model, read_json, resolve_folder

PROBE_SIDE = 8
"""Height and width of the probe latents: the smallest that the four levels halve three times."""


@dataclass(frozen=True)
class Components:
    """The parts of one teacher, on one device."""

    location: str
    """The folder or hub id that the user named."""
    folder: Path
    """Where its files lie on this machine."""
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline, location: str, folder: Path) -> "Components":
        """The frozen parts of a pipeline whose configs lie in `folder`."""
        parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        for part in parts:
            part.eval().requires_grad_(False)
        return cls(location, folder, *parts, pipeline.tokenizer, _read_schedule(folder))

    @property
    def name_facts(self) -> dict[str, str]:
        """How an export names its teacher: a hub id in full, of a local path only the last part."""
        local = Path(self.location).is_dir()
        return {"teacher": self.folder.resolve().name} if local else {"base_model": self.location}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.unet.config["sample_size"]
        return self.unet.config["in_channels"], size, size

    @property
    def picture_pixels(self) -> int:
        """Height and width of a picture."""
        halvings = len(self.vae.config["block_out_channels"]) - 1
        return int(self.unet.config["sample_size"]) << halvings


def load_components(location: str, device: torch.device, dtype: torch.dtype, folder: Path | None = None) -> Components:
    """Load and freeze every part of `location`, whose files lie in `folder` if that is known already.

    Raises `Refused` for a missing folder, another architecture, and an incomplete or unusable part.
    """
    folder = folder or resolve_folder(location)
    check_sd1_architecture(folder)
    schedule = _read_schedule(folder)
    check_component_match(folder)
    tokenizer = load_tokenizer(folder)
    unet, vae, text_encoder = (load_component(folder, part, dtype) for part in WEIGHT_FILES)
    components = Components(location, folder, unet, vae, text_encoder, tokenizer, schedule)
    _check_forward_passes(components)
    for part in (unet, vae, text_encoder):
        part.to(device)
    return components


def _read_schedule(folder: Path) -> NoiseSchedule:
    return NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))


@torch.inference_mode()
def _check_forward_passes(components: Components) -> None:
    """Raise `Refused` for a part whose forward pass fails or is not finite.

    Libraries look at many entries of a config only when they compute, and finite weights may be too large for that.
    """
    unet, vae, text_encoder = components.unet, components.vae, components.text_encoder
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config["in_channels"], PROBE_SIDE, PROBE_SIDE, generator=generator).to(unet.dtype)
    last_step = torch.tensor([components.schedule.steps - 1])

    def encode_texts() -> Any:
        texts = ["", PROBE_SENTENCE]
        tokens = components.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids).last_hidden_state

    def reconstruct() -> Any:
        return vae.encode(vae.decode(noise / vae.config["scaling_factor"]).sample).latent_dist.mean

    cond = _checked_output(components.folder / "text_encoder", encode_texts)
    _checked_output(components.folder / "unet", lambda: unet(noise, last_step, cond[:1]).sample, noise.shape)
    _checked_output(components.folder / "vae", reconstruct, noise.shape)


def _checked_output(part: Path, compute: Callable[[], Any], shape: torch.Size | None = None) -> Tensor:
    output: Tensor = call_library(f"teacher: {part}", part.parent, compute)
    if shape is not None and output.shape != shape:
        raise broken_model(f"{part}: its output has the shape {list(output.shape)}, latents have {list(shape)}")
    if not bool(output.isfinite().all()):
        raise broken_model(f"{part}: its answer is not finite, so its weights are not those of a model")
    return output
