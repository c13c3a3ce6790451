"""Pictures as a stranger makes them: stock diffusers pipelines on folders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from stages.nets.anatomy import check_fit
from stages.nets.files import WEIGHTS, read_json
from stages.nets.loading import by_library, load_part, load_tokenizer


def open_stock(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """The folder's pipeline with the folder's own scheduler, in fp32 and without a safety checker."""
    check_fit(folder)
    parts = {part: load_part(folder, part, torch.float32) for part in WEIGHTS}
    parts["tokenizer"] = load_tokenizer(folder)
    pipeline = by_library(
        str(folder),
        folder,
        lambda: StableDiffusionPipeline.from_pretrained(
            folder, **parts, safety_checker=None, requires_safety_checker=False, local_files_only=True
        ),
    ).to(device)
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
