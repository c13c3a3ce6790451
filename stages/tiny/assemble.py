"""Trained parts -> `model/`: a diffusers folder that loads by the very call that loads Stable Diffusion 1.5."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from stages.system.refusal import Refused
from stages.tiny import anatomy
from stages.tiny.fit import PARTS, SEED, draw_scenes
from stages.tiny.judge import AttributeClassifier

LATENT_UNIT = 0.18215
"""The folder's latents are as large as SD1.5's, so that a forgotten scaling factor shows as it would there."""


def load_average(work: Path, part: str, module: nn.Module) -> nn.Module:
    """`module` with the averaged weights of a finished part."""
    path = work / f"{part}.pt"
    if not path.exists():
        raise Refused(f"{path} does not exist - run python -m stages.tiny fit --parts {part}")
    module.load_state_dict(torch.load(path, weights_only=True)["averaged"])
    return module.eval()


@torch.no_grad()
def enlarge_latents(vae: AutoencoderKL, factor: float) -> None:
    """Make the encoder's latents `factor` times larger and let the decoder undo it: exact, in two 1x1 convolutions."""
    mean, log_variance = slice(0, 4), slice(4, 8)
    vae.quant_conv.weight[mean] *= factor
    vae.quant_conv.bias[mean] *= factor
    vae.quant_conv.bias[log_variance] += 2 * torch.log(torch.tensor(factor))
    vae.post_quant_conv.weight /= factor


@torch.no_grad()
def measured_scale(vae: AutoencoderKL) -> float:
    """One over the standard deviation of the encoder's latents on 1000 pictures."""
    scenes = draw_scenes(1000, seed=SEED + 1)
    latents = [vae.encode(scenes.normalised(rows)).latent_dist.mean for rows in torch.arange(1000).split(100)]
    return 1 / float(torch.cat(latents).std())


def nest_text_keys(folder: Path) -> None:
    """Rewrite a text encoder's weights under `text_model.`, the names that every version of transformers reads."""
    file = folder / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def load_in_float32(config: Path) -> None:
    """Name float32 as the type to load in: transformers else takes that of the file, and diffusers always float32."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")


def assemble(work: Path, out: Path) -> None:
    """Write every part in fp16 into `out`, replacing what lies there."""
    tokenizer = anatomy.build_tokenizer()
    vae, judge = anatomy.build_vae(), AttributeClassifier()
    teacher = nn.ModuleDict({"unet": anatomy.build_unet(), "text_encoder": anatomy.build_text_encoder(tokenizer)})
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])
    for part, module in zip(PARTS, (judge, decoder, encoder, teacher), strict=True):
        load_average(work, part, module)
    enlarge_latents(vae, 1 / LATENT_UNIT)
    vae.register_to_config(scaling_factor=round(measured_scale(vae), 5))
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=teacher["text_encoder"].half(),
        tokenizer=tokenizer,
        unet=teacher["unet"].half(),
        scheduler=anatomy.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    nest_text_keys(out / "text_encoder")
    load_in_float32(out / "text_encoder" / "config.json")
    anatomy.save_tokenizer(tokenizer, out / "tokenizer")
    (out / "judge").mkdir()
    weights = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    save_file(weights, out / "judge" / "judge.safetensors")
