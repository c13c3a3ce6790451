"""Folders of pictures that other programs made, each with the sentence of every picture."""

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from configs.values import PictureSize
from stages.classes.photographs import FORMATS, MAX_FILE_BYTES, crop_and_resize, open_picture
from stages.system.refusal import Refused, format_value, in_one_line
from stages.system.text import parse_json, read_bytes, read_clean_text, split_lines

LISTS = ("prompts.json", "prompts.csv")
"""Names of a list of the sentences, beside the pictures."""
FILE, PROMPT = "file", "prompt"
"""The keys, or the columns, of a list."""
LIST_REMEDY = (
    'write {"a.png": "a red star", ...} or [{"file": ..., "prompt": ...}, ...], or a csv file with the columns file '
    "and prompt"
)
BATCH = 50


@dataclass(frozen=True, eq=False)
class PictureFolder:
    """The pictures of a folder by file name, and their sentences."""

    name: str
    files: Sequence[Path]
    texts: Sequence[str]

    def batches(self, rows: Sequence[int], size: PictureSize) -> Iterator[Float[Tensor, "b 3 height width"]]:
        """Some of the pictures in [0, 1], the middle of each brought to one size."""
        yield from load_pictures([self.files[row] for row in rows], size)

    def rows_of(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """(rows of `texts`, rows of the folder): each picture beside the next row of the same sentence."""
        waiting: dict[str, list[int]] = defaultdict(list)
        for row, text in reversed(list(enumerate(self.texts))):
            waiting[text].append(row)
        pairs = [(i, waiting[text].pop()) for i, text in enumerate(map(normalise, texts)) if waiting.get(text)]
        return [i for i, _ in pairs], [row for _, row in pairs]


def normalise(text: str) -> str:
    """A sentence with single spaces."""
    return " ".join(text.split())


def load_pictures(files: Sequence[Path], size: PictureSize) -> Iterator[Float[Tensor, "b 3 height width"]]:
    """Pictures in [0, 1], the middle of each brought to one size, `BATCH` at once; raises `Refused` naming a file."""
    for first in range(0, len(files), BATCH):
        yield torch.stack([crop_and_resize(read_picture(file), size) for file in files[first : first + BATCH]])


def read_picture(file: Path) -> Any:
    """An RGB picture; raises `Refused` naming a file that is none."""
    return open_picture(read_bytes(file, str(file), "remove it, or write it again", MAX_FILE_BYTES), file)


def open_picture_folders(folders: Sequence[Path], taken: Sequence[str]) -> list[PictureFolder]:
    """Every folder under its own name; raises `Refused` for a name of two columns and for what cannot be used."""
    opened = list[PictureFolder]()
    for folder in folders:
        name = folder.resolve().name
        if name in taken or name in [one.name for one in opened]:
            raise Refused(f"pictures: {folder}: {name!r} is the name of another column - rename the folder")
        opened.append(open_picture_folder(folder, name))
    return opened


def open_picture_folder(folder: Path, name: str) -> PictureFolder:
    """The pictures of a folder, each opened once; raises `Refused` naming the first thing that cannot be used."""
    if not folder.is_dir():
        raise Refused(f"pictures: {folder}: is no folder - name one with png, jpg or webp files")
    try:
        visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise Refused(f"pictures: {folder}: cannot be read ({error.strerror}) - see its permissions") from error
    files = [path for path in visible if path.suffix.lower() in FORMATS]
    if not files:
        raise Refused(f"pictures: {folder}: holds no png, jpg or webp file - name a folder with pictures")
    lists = [path for path in visible if path.name in LISTS]
    if len(lists) > 1:
        raise Refused(f"pictures: {folder}: holds {' and '.join(path.name for path in lists)} - remove one of them")
    texts = _listed_texts(lists[0], files) if lists else [_text_of_name(file) for file in files]
    for file in files:
        read_picture(file)
    return PictureFolder(name, files, texts)


def _text_of_name(file: Path) -> str:
    """A sentence that is the file's name: `a red star.png`, or `a_red_star.png`."""
    text = normalise(file.stem.replace("_", " "))
    if not any(letter.isalpha() for letter in text):
        raise Refused(f"{file}: its name is no sentence - name it by its prompt, or list the prompts in {LISTS[0]}")
    return text


def _listed_texts(file: Path, pictures: Sequence[Path]) -> list[str]:
    """The sentence of each picture by a list; raises `Refused` unless it names exactly these pictures."""
    texts = _read_csv(file) if file.suffix == ".csv" else _read_json(file)
    names = {picture.name for picture in pictures}
    if unknown := next((name for name in texts if name not in names), None):
        raise Refused(f"{file}: {format_value(unknown)}: no such picture beside it - remove the entry, or add the file")
    if missing := next((picture.name for picture in pictures if picture.name not in texts), None):
        raise Refused(f"{file}: names no prompt of {missing} - add it, or move the picture away")
    return [texts[picture.name] for picture in pictures]


def _read_json(file: Path) -> dict[str, str]:
    text = read_clean_text(file, str(file), LIST_REMEDY)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise Refused(f"{file}: is not JSON ({in_one_line(error)}) - {LIST_REMEDY}") from error
    if isinstance(content, dict):
        return _checked(file, list(content.items()))
    if isinstance(content, list) and all(isinstance(one, dict) and {FILE, PROMPT} <= one.keys() for one in content):
        return _checked(file, [(one[FILE], one[PROMPT]) for one in content])
    raise Refused(f"{file}: is no list of pictures and prompts - {LIST_REMEDY}")


def _read_csv(file: Path) -> dict[str, str]:
    lines = split_lines(read_clean_text(file, str(file), LIST_REMEDY))
    try:
        rows: list[Mapping[str, Any]] = list(csv.DictReader((f"{line}\n" for line in lines), strict=True))
    except csv.Error as error:
        raise Refused(f"{file}: is not good CSV ({in_one_line(error)}) - {LIST_REMEDY}") from error
    if rows and not {FILE, PROMPT} <= rows[0].keys():
        raise Refused(f"{file}: has no columns {FILE} and {PROMPT} - {LIST_REMEDY}")
    return _checked(file, [(row[FILE], row[PROMPT]) for row in rows])


def _checked(file: Path, entries: Sequence[tuple[Any, Any]]) -> dict[str, str]:
    """File name -> sentence; raises `Refused` for a name that stands there twice and for what is no sentence."""
    texts: dict[str, str] = {}
    for name, text in entries:
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise Refused(f"{file}: {format_value(name)}: {format_value(text)} is no prompt - {LIST_REMEDY}")
        if name in texts:
            raise Refused(f"{file}: {format_value(name)}: stands there twice - leave one")
        texts[name] = normalise(text)
    return texts
