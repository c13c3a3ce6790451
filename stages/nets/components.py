"""Whether the parts of a model answer at all: one small question to each, before hours are spent on them.

A diffusers folder or a hub id -> the parts of a Stable Diffusion 1.x model, checked before anything is computed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stages.flow.schedule import NoiseSchedule
from stages.nets.anatomy import check_component_match, check_sd1_architecture
from stages.nets.files import FETCH_REMEDY, WEIGHT_FILES, read_json, resolve_folder
from stages.nets.loading import call_library, load_component, load_tokenizer
from stages.nets.tokens import PROBE_SENTENCE
from stages.system.refusal import Refused

LATENT_SIDE = 8
"""Of the latents that are tried: the smallest that four levels halve three times."""


@torch.inference_mode()
def check_forward_passes(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    last_step: int,
) -> None:
    """Raise `Refused` for a part that fails at a small question, or whose answer is no number.

    Configs hold much that a library looks at only when it computes, and finite weights may be too large for that.
    """
    noise = torch.randn(
        1, unet.config["in_channels"], LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(0)
    )
    noise = noise.to(unet.dtype)

    def encode() -> Tensor:
        tokens = tokenizer(["", PROBE_SENTENCE], padding="max_length", truncation=True, return_tensors="pt")
        states: Tensor = text_encoder(tokens.input_ids).last_hidden_state
        return states

    def answer() -> Tensor:
        sample: Tensor = unet(noise, torch.tensor([last_step]), states[:1]).sample
        return sample

    def there_and_back() -> Tensor:
        picture = vae.decode(noise / vae.config["scaling_factor"]).sample
        latents: Tensor = vae.encode(picture).latent_dist.mean
        return latents

    states = _check_output(folder / "text_encoder", call_library(f"teacher: {folder}/text_encoder", folder, encode))
    _check_output(folder / "unet", call_library(f"teacher: {folder}/unet", folder, answer), noise.shape)
    _check_output(folder / "vae", call_library(f"teacher: {folder}/vae", folder, there_and_back), noise.shape)


def _check_output(component_folder: Path, output: Tensor, shape: torch.Size | None = None) -> Tensor:
    if shape is not None and output.shape != shape:
        found, expected = list(output.shape), list(shape)
        raise Refused(
            f"teacher: {component_folder}: answers with {found} where {expected} are latents - {FETCH_REMEDY}"
        )
    if not bool(output.isfinite().all()):
        raise Refused(
            f"teacher: {component_folder}: its answer is not finite, so its weights are not those of a model - "
            f"{FETCH_REMEDY}"
        )
    return output


@dataclass(frozen=True)
class Components:
    """The parts of one teacher, on one device."""

    location: str
    """The folder or hub id that was asked for."""
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
        schedule = NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        for part in parts:
            part.eval().requires_grad_(False)
        return cls(location, folder, *parts, pipeline.tokenizer, schedule)

    @property
    def name_facts(self) -> dict[str, str]:
        """What an export says of its teacher: a hub id may be told to anybody, of a local path only the last part."""
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


def load_components(location: str, device: torch.device, dtype: torch.dtype) -> Components:
    """Load and freeze every part; raises `Refused` for a missing folder, another architecture, or a part not whole."""
    return load_components_from(resolve_folder(location), location, device, dtype)


def load_components_from(folder: Path, location: str, device: torch.device, dtype: torch.dtype) -> Components:
    """The same for a `location` whose folder is known."""
    check_sd1_architecture(folder)
    schedule = NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    check_component_match(folder)
    tokenizer = load_tokenizer(folder)
    unet, vae, text_encoder = (load_component(folder, part, dtype) for part in WEIGHT_FILES)
    check_forward_passes(folder, unet, vae, text_encoder, tokenizer, schedule.steps - 1)
    return Components(location, folder, unet.to(device), vae.to(device), text_encoder.to(device), tokenizer, schedule)
