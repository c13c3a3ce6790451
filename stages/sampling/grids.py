"""Grids of pictures as PNG, from fixed noises: comparison grids of models, and contact sheets of labelled pictures."""

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from torch import Tensor

from configs.values import PictureSize, Strict
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.sampling.sampler import Sampler, sample_student, sample_teacher
from stages.system.atomic import atomic_path

SETTINGS_KEY = "sollune"
GAP_PIXELS, HEADER_PIXELS, LABEL_PIXELS = 4, 20, 180
MAX_DOUBLED_PIXELS = 128
"""A sheet of pictures whose longest side is up to this shows them twice as large."""
MIN_COLUMN_PIXELS = 64
"""Width of the columns of narrow pictures, so that a word fits above or below them."""

SHEET_FILE = "set_aside.png"
MAX_PICTURES = 400
"""Pictures on a contact sheet: the first ones."""
MAX_WIDTH_PIXELS = 2 * MAX_DOUBLED_PIXELS
LABEL_LINES, LINE_HEIGHT_PIXELS, LETTER_WIDTH_PIXELS = 5, 14, 6.5

FEW_STEPS = 4
"""Steps of the last column of a comparison grid."""


def fixed_noise(seed: int, index: int, shape: Sequence[int]) -> Float[Tensor, "c h w"]:
    """Noise number `index` of a seed, whatever the number of noises; sampled on the CPU in fp32."""
    generator = torch.Generator().manual_seed(derived_seed("noise", seed, index))
    return torch.randn(tuple(shape), generator=generator)


def fixed_noises(seed: int, count: int, shape: Sequence[int]) -> Float[Tensor, "n c h w"]:
    """Noises 0 ... count - 1 of a seed."""
    return torch.stack([fixed_noise(seed, index, shape) for index in range(count)])


def to_pil_image(picture: Float[Tensor, "3 h w"], longest_side: int | None = None) -> Image.Image:
    """A picture in [0, 1]; a tiny one doubled, pixel by pixel.

    `longest_side` is that of all pictures on its sheet, which are doubled together.
    """
    pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if (longest_side or max(image.size)) > MAX_DOUBLED_PIXELS:
        return image
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)


def make_sheet(
    labels: Sequence[str], column_titles: Sequence[str], columns: Sequence[Float[Tensor, "rows 3 h w"]]
) -> Image.Image:
    """`labels` at the left of the rows, titles above the columns, `columns[j][i]` where row i meets column j.

    The pictures of one column are of one size; those of another column may be of another.
    """
    longest_side = max(max(column.shape[-2:]) for column in columns)
    images = [[to_pil_image(picture, longest_side) for picture in column] for column in columns]
    font = ImageFont.load_default(12)
    widths = _column_widths([column[0].size for column in images], column_titles)
    lefts = list(accumulate((width + GAP_PIXELS for width in widths), initial=LABEL_PIXELS))
    picture_height = max(column[0].height for column in images)
    high = picture_height + GAP_PIXELS
    canvas = Image.new("RGB", (lefts[-1], HEADER_PIXELS + len(labels) * high), "white")
    pen = ImageDraw.Draw(canvas)
    for left, title, column in zip(lefts, column_titles, images, strict=False):
        pen.text((left, GAP_PIXELS), title, "black", font)
        for i, image in enumerate(column):
            canvas.paste(image, (left, HEADER_PIXELS + i * high))
    max_lines = max(1, picture_height // 16)
    for i, label in enumerate(labels):
        lines = textwrap.wrap(label, LABEL_PIXELS // 7, max_lines=max_lines, placeholder=" ...")
        pen.text((GAP_PIXELS, HEADER_PIXELS + GAP_PIXELS + i * high), "\n".join(lines), "black", font)
    return canvas


def sheet_cells(
    sheet: Image.Image, rows: int, titles: Sequence[str], sizes: Sequence[PictureSize] = ()
) -> list[list[Image.Image]] | None:
    """The pictures of a sheet of `make_sheet` by row and column; None where it is no such sheet.

    `sizes` are those of the pictures, as many columns of each; without them all columns are as wide as the first.
    """
    high, odd_height = divmod(sheet.height - HEADER_PIXELS, rows)
    wide, odd_width = divmod(sheet.width - LABEL_PIXELS, len(titles))
    shapes = [(wide - GAP_PIXELS, high - GAP_PIXELS)] * len(titles)
    widths = [wide - GAP_PIXELS] * len(titles)
    if sizes:
        factor = 2 if max(max(size.width, size.height) for size in sizes) <= MAX_DOUBLED_PIXELS else 1
        each = len(titles) // len(sizes)
        shapes = [(factor * size.width, factor * size.height) for size in sizes for _ in range(each)]
        widths = _column_widths(shapes, titles[: len(shapes)])
        odd_width = sheet.width - LABEL_PIXELS - sum(widths) - GAP_PIXELS * len(widths)
    if odd_height or odd_width or any(width < 1 or not 0 < height <= high for width, height in shapes):
        return None
    lefts = accumulate((width + GAP_PIXELS for width in widths), initial=LABEL_PIXELS)
    boxes = [(x, x + width, height) for x, (width, height) in zip(lefts, shapes, strict=False)]
    tops = [HEADER_PIXELS + i * high for i in range(rows)]
    return [[sheet.crop((left, top, right, top + height)) for left, right, height in boxes] for top in tops]


def _column_widths(shapes: Sequence[tuple[int, int]], titles: Sequence[str]) -> list[int]:
    """Of columns of pictures with these widths and heights."""
    widths = [max(width, MIN_COLUMN_PIXELS) for width, _ in shapes]
    if len(set(shapes)) == 1:
        return widths
    # Titles then tell the size, and narrow columns are beside wide ones.
    font = ImageFont.load_default(12)
    return [max(width, math.ceil(font.getlength(title))) for width, title in zip(widths, titles, strict=True)]


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


def make_contact_sheet(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """The pictures, of any sizes, in cells of the largest width and height; their labels below them."""
    width = max(MIN_COLUMN_PIXELS, *(picture.width for picture in pictures))
    height = max(picture.height for picture in pictures)
    columns = math.ceil(math.sqrt(len(pictures)))
    wide, high = width + 2 * GAP_PIXELS, height + 2 * GAP_PIXELS + LABEL_LINES * LINE_HEIGHT_PIXELS
    canvas = Image.new("RGB", (columns * wide, math.ceil(len(pictures) / columns) * high), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = number % columns * wide + GAP_PIXELS, number // columns * high + GAP_PIXELS
        canvas.paste(picture, (x, y))
        lines = textwrap.wrap(label, int(width / LETTER_WIDTH_PIXELS), max_lines=LABEL_LINES, placeholder=" ...")
        pen.multiline_text((x, y + height + 1), "\n".join(lines), "black", font, spacing=2)
    return canvas


def save_contact_sheet(
    pictures: Iterable[Float[Tensor, "3 h w"]],
    labels: Sequence[str],
    path: Path,
    settings: Mapping[str, Any],
    longest_side: int | None = None,
) -> None:
    """Write a contact sheet of the first pictures; where there are none, an earlier sheet is removed.

    `longest_side` is that of all pictures, whose sizes may differ.
    """
    if not labels:
        path.unlink(missing_ok=True)
        return
    shown = [to_pil_image(picture, longest_side) for picture in islice(pictures, MAX_PICTURES)]
    for image in shown:
        image.thumbnail((MAX_WIDTH_PIXELS, MAX_WIDTH_PIXELS))
    metadata = {**settings, "pictures": len(labels), "shown": len(shown)}
    save_sheet(make_contact_sheet(shown, labels[: len(shown)]), path, metadata)


class GridConfig(Strict):
    """The prompts of the comparison grids."""

    prompts: tuple[str, ...] = Field(
        ("a photo of a cat", "a red car", "a house by a lake", "a portrait of a woman"),
        min_length=1,
        description="sentences, one row each",
    )
    seed: int = Field(0, description="seed of the fixed noises")
    sampler: Sampler = Field(Sampler(), description="how the pictures are sampled")


def comparison_grid_hook(
    teacher: Teacher, config: GridConfig, folder: Path, sizes: Sequence[PictureSize] = ()
) -> Callable[[int, Student], None]:
    """The grid hook of distillation: the teacher, and the student with as many steps and with few.

    These three columns for each of `sizes`; none takes the teacher's own size.
    """
    steps, few = config.sampler.steps, config.sampler.model_copy(update={"steps": FEW_STEPS})
    titles = (f"teacher {steps}", f"student {steps}", f"student {FEW_STEPS}")
    settings, samplers = config.model_dump(mode="json"), (config.sampler, few)
    return grid_hook(
        teacher, config.prompts, config.prompts, titles, config.seed, samplers, folder, settings, sizes=sizes
    )


def grid_hook(
    teacher: Teacher,
    texts: Sequence[str],
    labels: Sequence[str],
    titles: Sequence[str],
    seed: int,
    samplers: Sequence[Sampler],
    folder: Path,
    settings: Mapping[str, Any],
    load_baseline: Callable[[], Student] | None = None,
    sizes: Sequence[PictureSize] = (),
    baseline: Student | None = None,
) -> Callable[[int, Student], None]:
    """A function of (samples, student) that writes `<folder>/<samples>.png`, unless the file exists.

    A row for each text. Columns, with these titles, for each of `sizes` (none: the teacher's own): the teacher and, if
    any, a baseline student, both sampled once and with the first sampler; then the student with each sampler. The
    baseline is loaded for the first grid; one that changes afterwards is given as `baseline` and sampled at once.
    """
    parts, cond, uncond = teacher.components, teacher.encode_texts(texts), teacher.uncond
    native = parts.native_size
    sizes = tuple(sizes) or (native,)
    if sizes != (native,):
        settings = {**settings, "sizes": [str(size) for size in sizes]}
    all_titles = list(titles) if len(sizes) == 1 else [f"{size} {title}" for size in sizes for title in titles]
    noises = {size: fixed_noises(seed, len(texts), parts.latent_shape(size)).to(cond.device) for size in sizes}
    fixed: dict[PictureSize, list[Tensor]] = {}

    def sample_fixed(size: PictureSize, other: Student | None) -> list[Tensor]:
        inputs, scaled = (cond, uncond, noises[size]), samplers[0].scaled_to(size, native)
        columns = [sample_teacher(teacher, *inputs, scaled)]
        return [*columns, sample_student(other, *inputs, scaled)] if other else columns

    if baseline:
        fixed.update({size: sample_fixed(size, baseline) for size in sizes})

    def sample_columns(size: PictureSize, student: Student) -> list[Tensor]:
        inputs, scaled = (cond, uncond, noises[size]), [one.scaled_to(size, native) for one in samplers]
        if size not in fixed:
            fixed[size] = sample_fixed(size, load_baseline() if load_baseline else None)
        return [*fixed[size], *(sample_student(student, *inputs, sampler) for sampler in scaled)]

    def save_grid(samples: int, student: Student) -> None:
        path = folder / f"{samples:09d}.png"
        if path.exists():
            return
        latents = [column for size in sizes for column in sample_columns(size, student)]
        sheet = make_sheet(labels, all_titles, [teacher.decode_latents(column) for column in latents])
        save_sheet(sheet, path, {"samples": samples, "rows": list(labels), "columns": all_titles, **settings})

    return save_grid
