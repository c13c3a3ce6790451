"""A contact sheet: many pictures on one page, each with a few words below it."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stages.evaluate.grid import GAP, as_image, save_sheet

SHEET = "set_aside.png"
MOST = 400
"""Pictures on a sheet: the first ones."""
WIDEST = 256
"""Pixels: 2 x SMALL, so that a doubled picture is as it is."""
LINES, LINE_PIXELS, LETTER_PIXELS = 5, 14, 6.5


def contact_sheet(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """The pictures in rows, about as many rows as columns, their labels below them."""
    width, height = pictures[0].size
    columns = math.ceil(math.sqrt(len(pictures)))
    wide, high = width + 2 * GAP, height + 2 * GAP + LINES * LINE_PIXELS
    canvas = Image.new("RGB", (columns * wide, math.ceil(len(pictures) / columns) * high), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = number % columns * wide + GAP, number // columns * high + GAP
        canvas.paste(picture, (x, y))
        lines = textwrap.wrap(label, int(width / LETTER_PIXELS), max_lines=LINES, placeholder=" ...")
        pen.multiline_text((x, y + height + 1), "\n".join(lines), "black", font, spacing=2)
    return canvas


def save_contact_sheet(
    pictures: Iterable[Float[Tensor, "3 h w"]], labels: Sequence[str], path: Path, settings: Mapping[str, Any]
) -> None:
    """Write a sheet of the first pictures; where there are none, an earlier sheet is removed."""
    if not labels:
        path.unlink(missing_ok=True)
        return
    shown = [_small(as_image(picture)) for picture in islice(pictures, MOST)]
    kept = {**settings, "pictures": len(labels), "shown": len(shown)}
    save_sheet(contact_sheet(shown, labels[: len(shown)]), path, kept)


def _small(image: Image.Image) -> Image.Image:
    """Not wider than a sheet of hundreds can bear; tiny ones are doubled already."""
    image.thumbnail((WIDEST, WIDEST))
    return image
