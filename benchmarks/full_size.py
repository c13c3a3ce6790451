"""A teacher of Stable Diffusion 1.5's size with random weights, made from the architecture's published configuration.

Its answers mean nothing; its sizes, speeds and memory are the real ones. The tokenizer has CLIP's numbers of tokens and
merges, but made-up merges: a sentence is 77 tokens, mostly letters.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

EMBEDDED = Path("stages/tiny/model")
CONTEXT = 768
MERGES = 48_894


def make_full_size(folder: Path) -> Path:
    """Write the folder (4.3 GB) unless it is there whole already."""
    done = folder / "COMPLETE"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(folder / "tokenizer")
    if done.exists():
        return folder
    torch.manual_seed(0)
    for name, part in (("unet", unet()), ("vae", vae()), ("text_encoder", text_encoder())):
        part.save_pretrained(folder / name)
    shutil.copytree(EMBEDDED / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    shutil.copy(EMBEDDED / "model_index.json", folder)
    done.write_text(json.dumps({"parameters": "random"}) + "\n")
    return folder


def tokenizer() -> CLIPTokenizer:
    """49,408 tokens: 256 bytes, each also at the end of a word, 48,894 merges of two of them, and two marks."""
    letters: list[str] = list(bytes_to_unicode().values())  # type: ignore[no-untyped-call]
    pairs = [(a, b) for a in letters for b in letters][:MERGES]
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *map("".join, pairs),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    merges: Any = pairs  # its annotation names another type
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


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
