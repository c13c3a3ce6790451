"""The comparison grids of runs as small pictures within the page, thinned until all fit into it."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any

from PIL import Image, features

from configs.values import PictureSize
from stages.classes.photographs import DECODE_ERRORS
from stages.sampling.grids import FEW_STEPS, SETTINGS_KEY, sheet_cells
from stages.system.refusal import Refused, in_one_line

MAX_PICTURE_BYTES = 8 << 20
"""Of all pictures of a page, as text."""
SIZES_AND_CHECKPOINTS = ((512, 12), (512, 6), (256, 12), (256, 6), (256, 3), (128, 3), (128, 1), (64, 1), (32, 1))
"""The longest side in pixels and the checkpoints of a run, from the best; the first that fits is taken."""
MAX_ROWS, MAX_COLUMNS = 12, 12
MAX_SHEET_SIDES = 3
"""A sheet that is not taken apart may be so many times as long as a picture."""
QUALITY = 82


@dataclass(frozen=True)
class Sheet:
    """One comparison grid: a row for each prompt, a column for each model; or the whole sheet as one picture."""

    samples: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    """Keys of pictures, by row and column."""
    is_whole: bool
    hidden_rows: int
    """Prompts that the page leaves out."""


@dataclass(frozen=True)
class Album:
    """The pictures of a page."""

    pictures: Mapping[str, str]
    """Key -> data URI."""
    sheets: Sequence[Sequence[Sheet]]
    """Of each run, its newest checkpoint last."""
    note: str
    """What was left out."""


def make_album(grids: Sequence[Mapping[int, Path]], max_bytes: int = MAX_PICTURE_BYTES) -> Album:
    """The grids of each run, from many large pictures to few small ones until they take up to `max_bytes`.

    Raises `Refused` for a grid that is no picture, and where even the smallest do not fit.
    """
    total = 0
    for side, checkpoints in SIZES_AND_CHECKPOINTS:
        chosen = [_spread(sorted(own), checkpoints) for own in grids]
        pictures: dict[str, str] = {}
        sheets = [
            [_read_sheet(own[samples], samples, side, pictures) for samples in numbers]
            for own, numbers in zip(grids, chosen, strict=True)
        ]
        total = sum(map(len, pictures.values()))
        if total <= max_bytes:
            left_out = sum(len(own) - len(numbers) for own, numbers in zip(grids, chosen, strict=True))
            return Album(pictures, sheets, _note(side, left_out))
    raise Refused(
        f"grids: {total >> 20} MiB at their smallest, a page takes {max_bytes >> 20} - name fewer runs on one page"
    )


def _note(side: int, left_out: int) -> str:
    text = f"Pictures are stored at up to {side} pixels."
    if left_out:
        text += (
            f" {left_out} grids of other checkpoints lie in the run folders and are left out, to keep the page small."
        )
    return text


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers, evenly from the first to the last; the last alone for one."""
    if len(numbers) <= count:
        return list(numbers)
    if count == 1:
        return [numbers[-1]]
    return [numbers[round(i * (len(numbers) - 1) / (count - 1))] for i in range(count)]


def _read_sheet(path: Path, samples: int, side: int, pictures: dict[str, str]) -> Sheet:
    """One grid; its pictures are added to `pictures`."""
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):  # opening a pipe would wait for its writer
            raise OSError("it is no file")
    except OSError as error:
        raise _no_picture(path, error) from error
    sheet, own = _encoded_sheet(path, stat.st_mtime_ns, stat.st_size, samples, side)
    pictures.update(own)
    return sheet


@lru_cache(maxsize=1024)  # a page that is written again and again takes the grids from here
def _encoded_sheet(path: Path, _changed: int, _size: int, samples: int, side: int) -> tuple[Sheet, dict[str, str]]:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
            settings = _settings(opened.info.get(SETTINGS_KEY))
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise _no_picture(path, error) from error
    rows, columns = _titles(settings)
    try:
        cells = sheet_cells(image, len(rows), columns, _sizes(settings)) if rows and columns else None
    except ValueError:  # titles that are none
        cells = None
    if cells is None:
        key, uri = _encode(image, MAX_SHEET_SIDES * side)
        return Sheet(samples, ("all prompts",), ("all models",), ((key,),), True, 0), {key: uri}
    shown = [row[:MAX_COLUMNS] for row in cells[:MAX_ROWS]]
    encoded = [[_encode(cell, side) for cell in row] for row in shown]
    keys = tuple(tuple(key for key, _ in row) for row in encoded)
    sheet = Sheet(samples, rows[:MAX_ROWS], columns[:MAX_COLUMNS], keys, False, max(0, len(rows) - MAX_ROWS))
    return sheet, {key: uri for row in encoded for key, uri in row}


def _no_picture(path: Path, error: Exception) -> Refused:
    return Refused(f"{path}: no picture ({in_one_line(error, 80)}) - remove it, the run goes on without")


def _settings(stored: Any) -> dict[str, Any]:
    """What a grid records of itself; empty for a picture of another program."""
    try:
        settings = json.loads(stored)
    except (ValueError, TypeError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _titles(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels of the rows and titles of the columns; grids of before recorded their prompts and sampler alone."""
    rows, columns = settings.get("rows", settings.get("prompts")), settings.get("columns")
    sampler, sizes = settings.get("sampler"), settings.get("sizes")
    steps = sampler.get("steps") if isinstance(sampler, dict) else None
    if columns is None and steps is not None:
        is_distillation = "pictures" not in settings
        columns = [f"teacher {steps}", f"student {steps}", f"student {FEW_STEPS}"]
        columns = columns if is_distillation else ["teacher", "distilled", "finetuned"]
        if isinstance(sizes, list) and len(sizes) > 1:
            columns = [f"{size} {title}" for size in sizes for title in columns]
    if not (isinstance(rows, list) and isinstance(columns, list)):
        return (), ()
    return tuple(map(str, rows)), tuple(map(str, columns))


def _sizes(settings: Mapping[str, Any]) -> tuple[PictureSize, ...]:
    """The picture sizes of a grid that records several; empty for the teacher's own alone."""
    sizes = settings.get("sizes")
    try:
        return tuple(PictureSize.parse(str(size)) for size in sizes) if isinstance(sizes, list) else ()
    except ValueError:
        return ()


def _encode(image: Image.Image, longest_side: int) -> tuple[str, str]:
    """A picture as its key and its data URI: WebP, or JPEG where Pillow has none."""
    image = image.copy()
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    stream = io.BytesIO()
    image.save(stream, kind, quality=QUALITY)
    content = stream.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return hashlib.sha256(content).hexdigest()[:12], uri


def readable_title(title: str) -> str:
    """`student 4` as a reader's words: student, 4 steps."""
    name, _, number = title.rpartition(" ")
    return f"{name}, {number} step{'s' * (number != '1')}" if name and number.isdecimal() else title


def is_teacher(title: str) -> bool:
    """Whether a column with this title is the teacher's."""
    return "teacher" in title.split()


def teacher_of(sheet: Sheet, column: int) -> int:
    """The column of the teacher beside which a column is read: the last one before it, of the same picture size."""
    return max((number for number in range(column + 1) if is_teacher(sheet.columns[number])), default=column)
