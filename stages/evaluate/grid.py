"""Fixed noises, and a sheet of pictures as PNG: a row for each prompt, a column for each model."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from configs.atomic import atomic_path
from stages.prompts import derived_seed

SETTINGS_KEY = "sollune"
GAP, HEAD, LABEL = 4, 20, 180
SMALL = 128
"""Pictures up to this width are shown twice as large."""


def fixed_noise(seed: int, index: int, shape: Sequence[int]) -> Float[Tensor, "c h w"]:
    """Noise number `index` of a seed: the same however many are asked for, drawn on the CPU in fp32."""
    generator = torch.Generator().manual_seed(derived_seed("noise", seed, index))
    return torch.randn(tuple(shape), generator=generator)


def fixed_noises(seed: int, count: int, shape: Sequence[int]) -> Float[Tensor, "n c h w"]:
    """Noises 0 ... count - 1 of a seed."""
    return torch.stack([fixed_noise(seed, index, shape) for index in range(count)])


def as_image(picture: Float[Tensor, "3 h w"]) -> Image.Image:
    """A picture in [0, 1]; a tiny one doubled, pixel by pixel."""
    pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return (
        image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST) if image.width <= SMALL else image
    )


def sheet(labels: Sequence[str], heads: Sequence[str], columns: Sequence[Float[Tensor, "rows 3 h w"]]) -> Image.Image:
    """`labels` at the left of the rows, `heads` above the columns, `columns[j][i]` where row i meets column j."""
    images = [[as_image(picture) for picture in column] for column in columns]
    width, height = images[0][0].size
    canvas = Image.new("RGB", (LABEL + len(heads) * (width + GAP), HEAD + len(labels) * (height + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for j, head in enumerate(heads):
        pen.text((LABEL + j * (width + GAP), GAP), head, "black", font)
        for i, image in enumerate(images[j]):
            canvas.paste(image, (LABEL + j * (width + GAP), HEAD + i * (height + GAP)))
    for i, label in enumerate(labels):
        pen.text((GAP, HEAD + GAP + i * (height + GAP)), _wrapped(label, height), "black", font)
    return canvas


def save_sheet(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG that carries the settings that made it, whole or not at all."""
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_sheet` wrote into a PNG."""
    with Image.open(path) as image:
        settings: dict[str, Any] = json.loads(image.info[SETTINGS_KEY])
    return settings


def _wrapped(label: str, height: int) -> str:
    """A label in lines that fit beside a picture of that height in pixels; the rest is cut."""
    return "\n".join(textwrap.wrap(label, LABEL // 7, max_lines=max(1, height // 16), placeholder=" ..."))
