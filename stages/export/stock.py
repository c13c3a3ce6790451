"""One file in the LDM layout as stock diffusers opens it, offline, against the folder that it was made from."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from configs.refusal import Refused
from stages.export import checks

STEPS, GUIDANCE = 2, 3.0


def stock_reads_the_same(
    file: Path, name: str, folder: Path, variant: str, tensors: Mapping[str, Tensor], unet_only: bool
) -> None:
    """`from_single_file` must give the folder's `tensors`, and sample the folder's latents.

    `name` is what the file is called in messages, `tensors` are named `<part>.<diffusers' name>`. One pipeline is held
    at a time: at SD-1.x's size each takes 4.3 GB.
    """
    meant = latents(_of_folder(folder, variant))
    pipeline = _open(file, folder, variant, unet_only)
    for part in ("unet",) if unet_only else ("unet", "vae", "text_encoder"):
        for key, value in getattr(pipeline, part).state_dict().items():
            stored = tensors.get(f"{part}.{key}", tensors.get(f"{part}.text_model.{key}"))
            if stored is None or not torch.equal(value, stored.float()):
                raise Refused(f"{name}: stock diffusers reads another {part}.{key} - {checks.AGAIN}")
    error = checks.relative(latents(pipeline), meant)
    most = STEPS * GUIDANCE * checks.rounding(len(tensors), torch.float32)
    if not error <= most:
        raise Refused(
            f"{name}: stock diffusers samples latents {error:.1e} away from the folder's, rounding explains "
            f"{most:.1e} - {checks.AGAIN}"
        )


def _open(file: Path, folder: Path, variant: str, unet_only: bool) -> StableDiffusionPipeline:
    told = {"config": str(folder), "local_files_only": True}
    if not unet_only:
        return StableDiffusionPipeline.from_single_file(file, **told)
    return _of_folder(folder, variant, unet=UNet2DConditionModel.from_single_file(file, subfolder="unet", **told))


def _of_folder(folder: Path, variant: str, **parts: UNet2DConditionModel) -> StableDiffusionPipeline:
    """In fp32, so that any processor can be asked; single files are opened so unless told."""
    return StableDiffusionPipeline.from_pretrained(folder, variant=variant or None, dtype=torch.float32, **parts)


def latents(pipeline: StableDiffusionPipeline) -> Tensor:
    """Small latents after a few steps: what is compared is the way, not the picture."""
    pipeline.set_progress_bar_config(disable=True)
    side, channels = checks.SIDE, pipeline.unet.config.in_channels
    pixels = side * pipeline.vae_scale_factor
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    drawn: Tensor = pipeline(
        "a red star",
        height=pixels,
        width=pixels,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        output_type="latent",
    ).images
    return drawn
