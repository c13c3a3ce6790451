"""A picture file of a stranger -> an upright RGB picture of the model's size; whatever is wrong with it is one line."""

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from configs.refusal import Refused

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Only these decoders are tried, whatever a file pretends to be."""
ANIMATED = {"PNG", "WEBP"}
"""Kinds whose pictures may be films; the second picture in a camera's jpeg is its depth or its preview."""
MOST_PIXELS = 1 << 26
"""8192 x 8192: beyond any camera that is held in a hand, and 200 MB when unpacked."""
MOST_BYTES = 1 << 28
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError, struct.error,
    zlib.error,
)  # fmt: skip
"""What the decoders of Pillow say of bytes that are not what their header promises."""
SHALLOW = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "RGBX", "La", "RGBa"}
"""Pillow's kinds of picture with up to 8 bits a channel; it would cut off the others instead of scaling them."""


def open_picture(content: bytes, file: Path) -> Image.Image:
    """The picture, turned as its camera says, what is transparent on white; raises `Refused` naming the file."""
    if not content:
        raise Refused(f"{file}: is empty - save it again as png, or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # raised below MOST_PIXELS too, if set so
            with Image.open(BytesIO(content), formats=sorted(set(FORMATS.values()))) as image:
                _refuse_unfit(image, file)
                image.load()
                return _flat(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(f"{file}: too many pixels ({error}) - make it smaller") from error
    except UnidentifiedImageError as error:
        raise Refused(
            f"{file}: not a picture that can be read (its content is no png, jpg or webp) - convert it, or remove it"
        ) from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise Refused(
            f"{file}: not a picture that can be read ({reason}) - save it again as png, or remove it"
        ) from error


def fitted(image: Image.Image, pixels: int) -> Float[Tensor, "3 pixels pixels"]:
    """The middle square of a picture in [0, 1], resampled by Lanczos' kernel."""
    square = ImageOps.fit(image, (pixels, pixels), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def _refuse_unfit(image: Image.Image, file: Path) -> None:
    """Judge what the header says, before anything is unpacked."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise Refused(f"{file}: {width} x {height} pixels, at most {MOST_PIXELS} are read - make it smaller")
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        raise Refused(f"{file}: is a film of {getattr(image, 'n_frames', 2)} pictures - save the one that is meant")
    if image.mode not in SHALLOW:
        raise Refused(f"{file}: has more than 8 bits a channel ({image.mode}) - save it with 8")


def _flat(image: Image.Image) -> Image.Image:
    """RGB without transparency."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
