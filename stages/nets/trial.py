"""Whether the parts of a model answer at all: one small question to each, before hours are spent on them."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from configs.refusal import Refused
from stages.nets.files import AGAIN
from stages.nets.loading import by_library
from stages.nets.tokens import SENTENCE

SIDE = 8
"""Of the latents that are tried: the smallest that four levels halve three times."""


@torch.inference_mode()
def try_out(
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
    noise = torch.randn(1, unet.config["in_channels"], SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    noise = noise.to(unet.dtype)

    def encode() -> Tensor:
        tokens = tokenizer(["", SENTENCE], padding="max_length", truncation=True, return_tensors="pt")
        states: Tensor = text_encoder(tokens.input_ids).last_hidden_state
        return states

    def answer() -> Tensor:
        sample: Tensor = unet(noise, torch.tensor([last_step]), states[:1]).sample
        return sample

    def there_and_back() -> Tensor:
        picture = vae.decode(noise / vae.config["scaling_factor"]).sample
        latents: Tensor = vae.encode(picture).latent_dist.mean
        return latents

    states = _finite(folder / "text_encoder", by_library(f"teacher: {folder}/text_encoder", folder, encode))
    _finite(folder / "unet", by_library(f"teacher: {folder}/unet", folder, answer), noise.shape)
    _finite(folder / "vae", by_library(f"teacher: {folder}/vae", folder, there_and_back), noise.shape)


def _finite(where: Path, answer: Tensor, shape: torch.Size | None = None) -> Tensor:
    if shape is not None and answer.shape != shape:
        found, expected = list(answer.shape), list(shape)
        raise Refused(f"teacher: {where}: answers with {found} where {expected} are latents - {AGAIN}")
    if not bool(answer.isfinite().all()):
        raise Refused(f"teacher: {where}: its answer is not finite, so its weights are not those of a model - {AGAIN}")
    return answer
