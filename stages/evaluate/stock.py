"""Pictures as a stranger makes them: stock diffusers pipelines on folders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from configs.refusal import Refused
from stages.nets.components import read_json


def open_stock(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """The folder's pipeline with the folder's own scheduler, in fp32 and without a safety checker."""
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        ).to(device)
    except (OSError, ValueError) as error:
        raise Refused(f"{folder} cannot be loaded ({str(error).splitlines()[0]}) - export or fetch it again") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_ddim(pipeline: StableDiffusionPipeline, teacher_folder: Path) -> None:
    """Let the pipeline sample as a noise model does, by DDIM on the teacher's schedule."""
    pipeline.scheduler = DDIMScheduler.from_config(read_json(teacher_folder / "scheduler" / "scheduler_config.json"))


def paint(
    pipeline: StableDiffusionPipeline,
    texts: Sequence[str],
    noise: Float[Tensor, "b c h w"],
    steps: int,
    guidance: float,
    batch_size: int = 50,
) -> Float[Tensor, "b 3 H W"]:
    """Pictures in [0, 1], on the CPU."""
    pictures = []
    for first in range(0, len(texts), batch_size):
        rows = slice(first, first + batch_size)
        painted = pipeline(
            list(texts[rows]),
            latents=noise[rows].to(pipeline.device),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        pictures.append(painted.float().cpu())
    return torch.cat(pictures)
