"""A diffusers folder or a hub id -> the parts of a Stable Diffusion 1.x model, checked before anything is computed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from stages.flow.bridge import Schedule
from stages.nets.anatomy import check_anatomy, check_fit
from stages.nets.files import WEIGHTS, locate, read_json
from stages.nets.loading import load_part, load_tokenizer
from stages.nets.trial import try_out


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
    schedule: Schedule

    @classmethod
    def of_pipeline(cls, pipeline: StableDiffusionPipeline, location: str, folder: Path) -> "Components":
        """The frozen parts of a pipeline whose configs lie in `folder`."""
        schedule = Schedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        for part in parts:
            part.eval().requires_grad_(False)
        return cls(location, folder, *parts, pipeline.tokenizer, schedule)

    @property
    def name(self) -> dict[str, str]:
        """What an export says of its teacher: a hub id may be told to anybody, of a local path only the last part."""
        local = Path(self.location).is_dir()
        return {"teacher": self.folder.resolve().name} if local else {"base_model": self.location}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.unet.config["sample_size"]
        return self.unet.config["in_channels"], size, size

    @property
    def pixels(self) -> int:
        """Height and width of a picture."""
        halvings = len(self.vae.config["block_out_channels"]) - 1
        return int(self.unet.config["sample_size"]) << halvings


def load_components(location: str, device: torch.device, dtype: torch.dtype) -> Components:
    """Load and freeze every part; raises `Refused` for a missing folder, another architecture, or a part not whole."""
    return components_in(locate(location), location, device, dtype)


def components_in(folder: Path, location: str, device: torch.device, dtype: torch.dtype) -> Components:
    """The same for a `location` whose folder is known."""
    check_anatomy(folder)
    schedule = Schedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    check_fit(folder)
    tokenizer = load_tokenizer(folder)
    unet, vae, text_encoder = (load_part(folder, part, dtype) for part in WEIGHTS)
    try_out(folder, unet, vae, text_encoder, tokenizer, schedule.steps - 1)
    return Components(location, folder, unet.to(device), vae.to(device), text_encoder.to(device), tokenizer, schedule)
