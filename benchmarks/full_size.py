"""A teacher of Stable Diffusion 1.5's size with random weights, made from the architecture's published configuration.

Its answers mean nothing; its sizes, speeds and memory are the real ones. The tokenizer is the embedded teacher's: a
sentence is 77 tokens in both.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

EMBEDDED = Path("stages/tiny/model")
CONTEXT = 768


def make_full_size(folder: Path) -> Path:
    """Write the folder (4.3 GB) unless it is there whole already."""
    done = folder / "COMPLETE"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, part in (("unet", unet()), ("vae", vae()), ("text_encoder", text_encoder())):
        part.save_pretrained(folder / name)
    shutil.copytree(EMBEDDED / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(EMBEDDED / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    shutil.copy(EMBEDDED / "model_index.json", folder)
    done.write_text(json.dumps({"parameters": "random"}) + "\n")
    return folder


def unet() -> UNet2DConditionModel:
    """859,520,964 parameters."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=CONTEXT,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def vae() -> AutoencoderKL:
    """83,653,863 parameters."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def text_encoder() -> CLIPTextModel:
    """123,060,480 parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=CONTEXT,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_act="quick_gelu",
        )
    )
