"""A user's own photographs of a class, each with its caption."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, stack

from configs.refusal import Refused
from stages.classes import MARK, ClassSpec
from stages.pictures.opening import FORMATS, MOST_BYTES, fitted, open_picture
from stages.prompts import Prompt, derived_seed

MOST_CAPTION_BYTES = 1 << 14


@dataclass(frozen=True)
class Photograph(Prompt):
    """A caption with the file that shows it."""

    file: Path = field(kw_only=True)
    sha256: str = field(kw_only=True)


def photographs(spec: ClassSpec) -> list[Photograph]:
    """The photographs of a class by file name; raises `Refused` naming the first file that cannot be used."""
    if spec.images is None:
        return []
    return [_photograph(spec, file) for file in _files(spec.images, spec.name)]


def shown_in(photographs: Sequence[Photograph], pixels: int) -> Float[Tensor, "b 3 pixels pixels"]:
    """What they show, in [0, 1]; raises `Refused` for a file that is no longer what was listed."""
    pictures = []
    for photograph in photographs:
        content = _content(photograph.file, MOST_BYTES)
        if hashlib.sha256(content).hexdigest() != photograph.sha256:
            raise Refused(f"{photograph.file}: changed while it was read - start the command again")
        pictures.append(fitted(open_picture(content, photograph.file), pixels))
    return stack(pictures)


def _files(folder: Path, class_name: str) -> list[Path]:
    """The picture files of a folder by name; what is neither a picture, a caption nor hidden is refused."""
    if not folder.is_dir():
        raise Refused(f"class {class_name!r}: images: {folder} is no folder - name one with png, jpg or webp files")
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    for path in visible:
        if path.suffix.lower() not in {*FORMATS, ".txt"}:
            raise Refused(f"{path}: not a png, jpg or webp file - convert it, or move it out of the folder")
    found = [path for path in visible if path.suffix.lower() in FORMATS]
    if not found:
        raise Refused(f"class {class_name!r}: images: {folder} holds no png, jpg or webp file - put some there")
    return found


def _photograph(spec: ClassSpec, file: Path) -> Photograph:
    content = _content(file, MOST_BYTES)
    open_picture(content, file)  # refused here, before the teacher has painted anything
    sha256 = hashlib.sha256(content).hexdigest()
    seed, name = derived_seed("photograph", sha256), f"photograph{MARK}{spec.name}"
    return Photograph(_caption(spec, file), name, seed, file=file, sha256=sha256)


def _caption(spec: ClassSpec, file: Path) -> str:
    """The caption beside a photograph, or else the one of its class."""
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        if spec.caption is None:
            raise Refused(
                f"{file}: has no caption - write {beside.name} beside it, or `caption` of class {spec.name!r}"
            )
        return spec.caption
    try:
        caption = " ".join(_content(beside, MOST_CAPTION_BYTES).decode("utf-8").split())
    except UnicodeDecodeError as error:
        raise Refused(f"{beside}: is not UTF-8 text - save it again as UTF-8") from error
    if not caption:
        raise Refused(f"{beside}: is empty - write what {file.name} shows, or remove it")
    return caption


def _content(file: Path, most: int) -> bytes:
    """The bytes of a file, which may not be a pipe, a device or endless."""
    try:
        if not file.is_file():
            raise Refused(f"{file}: is no plain file - remove it")
        if file.stat().st_size > most:
            raise Refused(f"{file}: has {file.stat().st_size} bytes, at most {most} are read - make it smaller")
        return file.read_bytes()
    except OSError as error:
        raise Refused(f"{file}: cannot be read ({error.strerror}) - see its permissions, or remove it") from error
