"""The photographs of a class: untrusted picture files with captions -> upright RGB pictures of the model's size."""

import hashlib
import math
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from configs.values import PictureSize
from stages.classes.selection import CLASS_MARK
from stages.classes.specification import ClassSpec
from stages.nets.latents import aspect_distance
from stages.prompts import Prompt, derived_seed
from stages.system.refusal import Refused, first_invalid_character, format_value, invalid_character_reason
from stages.system.text import read_bytes, read_clean_text

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's decoders by file name ending; no others are tried, whatever the content."""
ANIMATED_FORMATS = {"PNG", "WEBP"}
"""Formats with animations; the second picture in a camera's jpeg is its depth or its preview."""
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "RGBX", "La", "RGBa"}
"""Pillow's modes with up to 8 bits a channel; it truncates the others instead of scaling them."""
MAX_PIXELS = 1 << 26
"""8192 x 8192: more than any hand-held camera has, and 200 MB in memory."""
MAX_FILE_BYTES = 1 << 28
MAX_CAPTION_BYTES = 1 << 14
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise for malformed content."""
NEGLIGIBLE_CUT = 0.005
"""A share of a picture's area that nobody misses: one pixel of a side of 200."""
WINDOWS_METADATA_FILES = {"thumbs.db", "desktop.ini"}
"""Hidden files that Windows puts into folders of pictures."""


@dataclass(frozen=True)
class Photograph(Prompt):
    """A caption with its picture file."""

    file: Path = field(kw_only=True)
    sha256: str = field(kw_only=True)
    upright_size: PictureSize = field(kw_only=True)
    """Its own size, turned as its EXIF data require."""


def list_photographs(spec: ClassSpec) -> list[Photograph]:
    """The photographs of a class by file name; raises `Refused` naming the first file that cannot be used."""
    if spec.images is None:
        return []
    files = _list_visible_files(spec.images, spec.name)
    captions = _match_captions(files)
    return [_make_photograph(spec, file, captions.get(file.stem)) for file in files if _is_picture(file)]


def hidden_file_lines(spec: ClassSpec) -> list[str]:
    """A line about the hidden files of a class's folder, which are not read."""
    hidden = [] if spec.images is None else [path for path in _list_folder(spec.images, spec.name) if _is_hidden(path)]
    if not hidden:
        return []
    return [f"class {spec.name!r}: images: {len(hidden)} hidden files left out (the first: {hidden[0].name})"]


def nearest_size(photograph: PictureSize, sizes: Sequence[PictureSize]) -> PictureSize:
    """The size whose aspect is nearest to that of a photograph; of those alike in it the nearest in area.

    The first of several equal ones.
    """

    def distance(size: PictureSize) -> tuple[float, float]:
        return round(aspect_distance(size, photograph), 9), abs(math.log(size.pixels / photograph.pixels))

    return min(sizes, key=distance)


def share_cut(photograph: PictureSize, size: PictureSize) -> float:
    """The share of a photograph's area that is cut off where it is brought to a size."""
    return 1 - math.exp(-aspect_distance(photograph, size))


def crop_lines(class_name: str, photographs: Sequence[Photograph], sizes: Sequence[PictureSize]) -> list[str]:
    """A line about the photographs of a class that are cropped to the nearest of these sizes, and by how much."""
    nearest = [nearest_size(one.upright_size, sizes) for one in photographs]
    shares = [share_cut(one.upright_size, size) for one, size in zip(photographs, nearest, strict=True)]
    cut = [share for share in shares if share > NEGLIGIBLE_CUT]
    if not cut:
        return []
    worst = photographs[shares.index(max(shares))]
    counts = Counter(nearest)
    by_size = ", ".join(f"{counts[size]} to {size}" for size in sizes if size in counts)
    return [
        f"class {class_name!r}: images: {len(cut)} of {len(photographs)} photographs lose their edges ({by_size}), "
        f"at most {100 * max(cut):.0f} % of the area ({worst.file.name}, {worst.upright_size})"
    ]


def load_photographs(photographs: Sequence[Photograph], size: PictureSize) -> Float[Tensor, "b 3 height width"]:
    """The pictures in [0, 1]; raises `Refused` for a file that has changed since it was listed."""
    pictures = []
    for photograph in photographs:
        content = read_bytes(photograph.file, str(photograph.file), "start the command again", MAX_FILE_BYTES)
        if hashlib.sha256(content).hexdigest() != photograph.sha256:
            raise Refused(f"{photograph.file}: changed while it was read - start the command again")
        pictures.append(crop_and_resize(open_picture(content, photograph.file), size))
    return torch.stack(pictures)


def open_picture(content: bytes, file: Path) -> Image.Image:
    """The RGB picture, turned as its EXIF data require, on white; raises `Refused` naming the file."""
    if not content:
        raise Refused(f"{file}: is empty - save it again as png, or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # its limit may be below MAX_PIXELS
            with Image.open(BytesIO(content), formats=sorted(set(FORMATS.values()))) as image:
                _refuse_unfit(image, file)
                image.load()
                return _flatten_alpha(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(f"{file}: too many pixels ({error}) - make it smaller") from error
    except DECODE_ERRORS as error:
        reason, way_out = " ".join(str(error).split())[:120] or type(error).__name__, "save it again as png"
        if isinstance(error, UnidentifiedImageError):
            reason, way_out = "its content is no png, jpg or webp", "convert it"
        raise Refused(f"{file}: not a picture that can be read ({reason}) - {way_out}, or remove it") from error


def crop_and_resize(image: Image.Image, size: PictureSize) -> Float[Tensor, "3 height width"]:
    """The middle of a picture in [0, 1], as large as the aspect of the size allows, resampled with Lanczos' kernel."""
    middle = ImageOps.fit(image, (size.width, size.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(middle)).permute(2, 0, 1).float() / 255


def _refuse_unfit(image: Image.Image, file: Path) -> None:
    """Check the header, before the pixels are decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Refused(f"{file}: {width} x {height} pixels, at most {MAX_PIXELS} are read - make it smaller")
    if image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False):
        raise Refused(
            f"{file}: is an animation of {getattr(image, 'n_frames', 2)} pictures - save the one that is meant"
        )
    if image.mode not in EIGHT_BIT_MODES:
        raise Refused(f"{file}: has more than 8 bits a channel ({image.mode}) - save it with 8")


def _flatten_alpha(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _list_folder(folder: Path, class_name: str) -> list[Path]:
    if not folder.is_dir():
        raise Refused(f"class {class_name!r}: images: {folder} is no folder - name one with png, jpg or webp files")
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise Refused(
            f"class {class_name!r}: images: {folder} cannot be read ({error.strerror}) - see its permissions"
        ) from error


def _list_visible_files(folder: Path, class_name: str) -> list[Path]:
    """The pictures and captions of a folder by name; raises `Refused` for all else that is not hidden."""
    visible = [path for path in _list_folder(folder, class_name) if not _is_hidden(path)]
    for path in visible:
        if (fault := invalid_character_reason(path.name)) or not path.name.isprintable():
            invalid = f"{fault} ({first_invalid_character(path.name)})" if fault else ""
            why = invalid or "of several lines or invisible characters"
            raise Refused(f"{folder}: {format_value(path.name)}: a file name {why} - rename it")
        if path.is_dir():
            raise Refused(f"{path}: is a folder, and only files right in {folder} are read - move it out of there")
        if path.suffix.lower() == ".caption":
            raise Refused(f"{path}: captions are read from .txt files - rename it {path.stem}.txt")
        if not _is_picture(path) and not _is_caption(path):
            raise Refused(f"{path}: not a png, jpg or webp file - convert it, or move it out of the folder")
    if not any(map(_is_picture, visible)):
        raise Refused(f"class {class_name!r}: images: {folder} holds no png, jpg or webp file - put some there")
    return visible


def _match_captions(files: Sequence[Path]) -> dict[str, Path]:
    """Stem -> caption; raises `Refused` unless each caption has one picture, and each picture at most one caption."""
    pictures, captions = [file for file in files if _is_picture(file)], dict[str, Path]()
    for caption in filter(_is_caption, files):
        matching = [file.name for file in pictures if file.stem == caption.stem]
        if not matching:
            name = caption.stem.casefold()  # a.png.txt and A.txt are near misses of a.txt
            near = [file for file in pictures if name in (file.name.casefold(), file.stem.casefold())]
            picture, stem = (near[0].name, near[0].stem) if near else ("a picture of that name", "NAME")
            raise Refused(f"{caption}: a caption without a picture - that of {picture} is named {stem}.txt")
        if len(matching) > 1:
            raise Refused(f"{caption}: is the caption of {' and '.join(matching)} - give each a name of its own")
        if caption.stem in captions:
            raise Refused(f"{caption}: {matching[0]} has another caption, {captions[caption.stem].name} - remove one")
        captions[caption.stem] = caption
    return captions


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in FORMATS


def _is_caption(file: Path) -> bool:
    return file.suffix.lower() == ".txt"


def _is_hidden(file: Path) -> bool:
    return file.name.startswith(".") or file.name.lower() in WINDOWS_METADATA_FILES


def _make_photograph(spec: ClassSpec, file: Path, caption: Path | None) -> Photograph:
    content = read_bytes(file, str(file), "remove it", MAX_FILE_BYTES)
    upright_size = PictureSize(*open_picture(content, file).size)  # refused before the teacher generates anything
    text = spec.caption
    if caption is not None:
        lines = read_clean_text(caption, f"{caption}", f"write what {file.name} shows", MAX_CAPTION_BYTES)
        text = " ".join(lines.split())
        if not text:
            raise Refused(f"{caption}: is empty - write what {file.name} shows, or remove it")
    if text is None:
        raise Refused(f"{file}: has no caption - write {file.stem}.txt beside it, or `caption` of class {spec.name!r}")
    sha256 = hashlib.sha256(content).hexdigest()
    name, seed = f"photograph{CLASS_MARK}{spec.name}", derived_seed("photograph", sha256)
    return Photograph(text, name, seed, file=file, sha256=sha256, upright_size=upright_size)
