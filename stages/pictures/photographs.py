"""A user's own photographs of a class, each with its caption."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, stack

from configs.characters import fault_of, faulty_character, printable
from configs.refusal import Refused
from configs.text import read_bytes, read_clean_text
from stages.classes import MARK, ClassSpec
from stages.pictures.opening import FORMATS, MOST_BYTES, fitted, open_picture
from stages.prompts import Prompt, derived_seed

MOST_CAPTION_BYTES = 1 << 14
OF_WINDOWS = {"thumbs.db", "desktop.ini"}
"""Files that Windows puts into folders of pictures and hides there."""


@dataclass(frozen=True)
class Photograph(Prompt):
    """A caption with the file that shows it."""

    file: Path = field(kw_only=True)
    sha256: str = field(kw_only=True)


def photographs(spec: ClassSpec) -> list[Photograph]:
    """The photographs of a class by file name; raises `Refused` naming the first file that cannot be used."""
    if spec.images is None:
        return []
    files = _visible(spec.images, spec.name)
    captions = _captions(files)
    return [_photograph(spec, file, captions.get(file.stem)) for file in files if _is_picture(file)]


def hidden_lines(spec: ClassSpec) -> list[str]:
    """A line about the hidden files of a class's folder, which are not read."""
    hidden = [] if spec.images is None else [path for path in _listed(spec.images, spec.name) if _is_hidden(path)]
    if not hidden:
        return []
    return [f"class {spec.name!r}: images: {len(hidden)} hidden files left out (the first: {hidden[0].name})"]


def shown_in(photographs: Sequence[Photograph], pixels: int) -> Float[Tensor, "b 3 pixels pixels"]:
    """What they show, in [0, 1]; raises `Refused` for a file that is no longer what was listed."""
    pictures = []
    for photograph in photographs:
        content = read_bytes(photograph.file, str(photograph.file), "start the command again", MOST_BYTES)
        if hashlib.sha256(content).hexdigest() != photograph.sha256:
            raise Refused(f"{photograph.file}: changed while it was read - start the command again")
        pictures.append(fitted(open_picture(content, photograph.file), pixels))
    return stack(pictures)


def _listed(folder: Path, class_name: str) -> list[Path]:
    """All that lies in a folder, by name."""
    if not folder.is_dir():
        raise Refused(f"class {class_name!r}: images: {folder} is no folder - name one with png, jpg or webp files")
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise Refused(
            f"class {class_name!r}: images: {folder} cannot be read ({error.strerror}) - see its permissions"
        ) from error


def _visible(folder: Path, class_name: str) -> list[Path]:
    """The pictures and captions of a folder by name; raises `Refused` for all else that is not hidden."""
    visible = [path for path in _listed(folder, class_name) if not _is_hidden(path)]
    for path in visible:
        if (fault := fault_of(path.name)) or not path.name.isprintable():
            why = f"{fault} ({faulty_character(path.name)})" if fault else "of several lines or invisible characters"
            raise Refused(f"{folder}: {printable(path.name)}: a file name {why} - rename it")
        if path.is_dir():
            raise Refused(f"{path}: is a folder, and only files right in {folder} are read - move it out of there")
        if path.suffix.lower() == ".caption":
            raise Refused(f"{path}: captions are read from .txt files - rename it {path.stem}.txt")
        if not _is_picture(path) and not _is_caption(path):
            raise Refused(f"{path}: not a png, jpg or webp file - convert it, or move it out of the folder")
    if not any(map(_is_picture, visible)):
        raise Refused(f"class {class_name!r}: images: {folder} holds no png, jpg or webp file - put some there")
    return visible


def _captions(files: Sequence[Path]) -> dict[str, Path]:
    """Name without ending -> caption; raises `Refused` unless each belongs to one picture, which has no other."""
    pictures, captions = [file for file in files if _is_picture(file)], dict[str, Path]()
    for caption in filter(_is_caption, files):
        shown_by = [file.name for file in pictures if file.stem == caption.stem]
        if not shown_by:
            name = caption.stem.casefold()  # of a.png: a.png.txt and A.txt come near to a.txt
            near = [file for file in pictures if name in (file.name.casefold(), file.stem.casefold())]
            picture, wanted = (near[0].name, near[0].stem) if near else ("a picture of that name", "NAME")
            raise Refused(f"{caption}: a caption without a picture - that of {picture} is named {wanted}.txt")
        if len(shown_by) > 1:
            raise Refused(f"{caption}: is the caption of {' and '.join(shown_by)} - give each a name of its own")
        if caption.stem in captions:
            raise Refused(f"{caption}: {shown_by[0]} has another caption, {captions[caption.stem].name} - remove one")
        captions[caption.stem] = caption
    return captions


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in FORMATS


def _is_caption(file: Path) -> bool:
    return file.suffix.lower() == ".txt"


def _is_hidden(file: Path) -> bool:
    return file.name.startswith(".") or file.name.lower() in OF_WINDOWS


def _photograph(spec: ClassSpec, file: Path, caption: Path | None) -> Photograph:
    content = read_bytes(file, str(file), "remove it", MOST_BYTES)
    open_picture(content, file)  # refused here, before the teacher has painted anything
    sha256 = hashlib.sha256(content).hexdigest()
    seed, name = derived_seed("photograph", sha256), f"photograph{MARK}{spec.name}"
    text = _own(spec, file) if caption is None else _read(caption, file)
    return Photograph(text, name, seed, file=file, sha256=sha256)


def _own(spec: ClassSpec, file: Path) -> str:
    """The caption of a class, for a photograph that has none."""
    if spec.caption is None:
        raise Refused(f"{file}: has no caption - write {file.stem}.txt beside it, or `caption` of class {spec.name!r}")
    return spec.caption


def _read(caption: Path, file: Path) -> str:
    """The caption of a photograph, on one line."""
    text = read_clean_text(caption, f"{caption}", f"write what {file.name} shows", MOST_CAPTION_BYTES)
    if not text.strip():
        raise Refused(f"{caption}: is empty - write what {file.name} shows, or remove it")
    return " ".join(text.split())
