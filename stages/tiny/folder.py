"""A teacher's parts as one diffusers folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from jaxtyping import Float
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from stages.system.atomic import temporary_path
from stages.system.refusal import Refused
from stages.tiny import anatomy
from stages.tiny.scenes import Scenes

MODEL = Path(__file__).with_name("model")
"""The embedded teacher."""
LATENT_UNIT = 0.18215
"""SD1.5's scaling factor: with latents of its size a forgotten factor shows as it would there."""


def write_folder(
    vae: AutoencoderKL,
    parts: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    out: Path,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write a teacher in fp16 into `out`, with extra files by name, replacing the teacher that lies there."""
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=parts["text_encoder"].half(),
        tokenizer=tokenizer,
        unet=parts["unet"].half(),
        scheduler=anatomy.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    refuse_other_folder(out)
    whole = temporary_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        pipeline.save_pretrained(whole)
        nest_text_keys(whole / "text_encoder")
        load_in_float32(whole / "text_encoder" / "config.json")
        tokenizer.save_pretrained(whole / "tokenizer")
        tokenizer.backend_tokenizer.model.save(str(whole / "tokenizer"))  # vocab.json, merges.txt: for transformers 4
        for name, content in (extra or {}).items():
            (whole / name).parent.mkdir(exist_ok=True)
            (whole / name).write_bytes(content)
        shutil.rmtree(out, ignore_errors=True)
        whole.rename(out)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def refuse_other_folder(out: Path) -> None:
    """Raise `Refused` where `out` holds anything but a teacher, which would be replaced."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "model_index.json").is_file())):
        raise Refused(f"--model: {out}: is no teacher's folder, and would be replaced - name a new folder")


def half_weights(module: nn.Module) -> bytes:
    """A module's weights in fp16, as a safetensors file."""
    return save({name: v.half() if v.is_floating_point() else v for name, v in module.state_dict().items()})


@torch.inference_mode()
def encode(vae: AutoencoderKL, scenes: Scenes) -> Float[Tensor, "n 4 h/8 w/8"]:
    """The encoder's latents of all pictures, not scaled."""
    rows_of = torch.arange(len(scenes.texts)).split(100)
    return torch.cat([vae.encode(scenes.normalised(rows)).latent_dist.mean for rows in rows_of])


def scale_of(latents: Float[Tensor, "n 4 h w"]) -> float:
    """The factor that gives latents unit variance, to five decimals."""
    return round(1 / float(latents.std()), 5)


def nest_text_keys(folder: Path) -> None:
    """Rewrite a text encoder's weights under `text_model.`, the names that every version of transformers reads."""
    file = folder / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def load_in_float32(config: Path) -> None:
    """Name float32 as the type to load in, as diffusers does; transformers else takes that of the file."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
