"""A diffusers folder or a hub id -> the parts of a Stable Diffusion 1.x model, checked before anything is computed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CLIPTextModel, CLIPTokenizer

from configs.refusal import Refused
from stages.flow.bridge import Schedule

ANATOMY = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "in_channels": 4,
    "out_channels": 4,
}
COMPONENTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
CONFIGS = ("*.json", "*.txt")
FILES = (*CONFIGS, "README.md", "LICENSE*", "unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors")


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
        return {"teacher": self.folder.name} if Path(self.location).is_dir() else {"base_model": self.location}

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


def locate(location: str, files: Sequence[str] = FILES) -> Path:
    """The local folder of a model: the folder itself, or a snapshot of these files of the hub repository."""
    if Path(location).is_dir():
        return Path(location)
    try:
        return Path(snapshot_download(location, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Refused(
            f"teacher: {location!r} is neither a folder nor a hub repository that can be reached - "
            "name a diffusers folder of an SD-1.x model"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A component's config; raises `Refused` with the file's name."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"teacher: {path} is missing - the folder must be a whole diffusers model") from error
    except json.JSONDecodeError as error:
        raise Refused(f"teacher: {path} is not JSON ({error}) - fetch the folder again") from error
    return content


def check_anatomy(folder: Path) -> None:
    """Raise `Refused` unless the folder holds a text-to-image model with SD1.x's nine blocks."""
    index = read_json(folder / "model_index.json")
    for name, expected in COMPONENTS.items():
        found = (index.get(name) or [None, None])[1]
        if found != expected:
            raise Refused(f"teacher: {folder}: {name} is {found}, not {expected} - only SD-1.x models can be converted")
    config = read_json(folder / "unet" / "config.json")
    for key, value in ANATOMY.items():
        if config.get(key) != value:
            raise Refused(
                f"teacher: {folder}/unet: {key} is {config.get(key)}, an SD-1.x model has {value} - "
                "only SD-1.x models can be converted"
            )


def identity(folder: Path) -> dict[str, str]:
    """What makes this teacher itself: component -> sha256 over its config and weights, never its path."""
    return {part: digest(folder / part) for part in (*COMPONENTS, "tokenizer", "scheduler")}


def digest(part: Path) -> str:
    """sha256 over the names and contents of a component's files."""
    sha = hashlib.sha256()
    for file in sorted(path for path in part.iterdir() if path.suffix in {".json", ".txt", ".safetensors"}):
        sha.update(file.name.encode())
        with open(file, "rb") as handle:
            sha.update(hashlib.file_digest(handle, "sha256").digest())
    return sha.hexdigest()


def load_components(location: str, device: torch.device, dtype: torch.dtype) -> Components:
    """Load and freeze every part; raises `Refused` for a missing folder, another architecture or prediction type."""
    folder = locate(location)
    check_anatomy(folder)
    schedule = Schedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=dtype)
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype)
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise Refused(f"teacher: {folder} cannot be loaded ({str(error).splitlines()[0]}) - fetch it again") from error
    for part in (unet, vae, text_encoder):
        part.eval().requires_grad_(False).to(device)
    return Components(location, folder, unet, vae, text_encoder, tokenizer, schedule)
