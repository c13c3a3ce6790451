"""Laws of the pictures of a page: each cell of a grid is found again, and all together keep to the bound."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from stages.report.pictures import Album, make_album, readable_title, teacher_of
from stages.system.refusal import Refused
from tests.report.made_runs import PROMPTS, make_grid


def grey(album: Album, key: str) -> float:
    """The mean of a picture, 0 to 1."""
    content = base64.b64decode(album.pictures[key].partition("base64,")[2])
    with Image.open(io.BytesIO(content)) as image:
        pixels = list(image.convert("L").tobytes())
    return sum(pixels) / len(pixels) / 255


@pytest.mark.parametrize("sizes", [(), ("16x16", "16x24", "40x8"), ("96x72", "64x200")])
def test_every_cell_is_found_where_the_grid_has_it(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    path = make_grid(tmp_path, 5, PROMPTS, None, 0.0, sizes)
    album = make_album([{5: path}])
    (sheet,) = album.sheets[0]
    assert not sheet.is_whole
    assert sheet.rows == PROMPTS
    assert len(sheet.columns) == 3 * max(1, len(sizes))
    for row, keys in enumerate(sheet.cells):
        for column, key in enumerate(keys):
            assert grey(album, key) == pytest.approx(row / 10 + column % 3 / 4, abs=0.02)
            assert teacher_of(sheet, column) == column - column % 3


def test_a_grid_that_cannot_be_taken_apart_is_shown_whole(tmp_path: Path) -> None:
    path = tmp_path / "000000001.png"
    Image.new("RGB", (301, 203), "white").save(path)
    (sheet,) = make_album([{1: path}]).sheets[0]
    assert sheet.is_whole
    assert len(sheet.cells) == len(sheet.cells[0]) == 1


def test_the_same_picture_is_stored_once(tmp_path: Path) -> None:
    grids = {samples: make_grid(tmp_path, samples, PROMPTS, None, 0.0) for samples in (1, 2, 3)}
    assert len(make_album([grids]).pictures) <= 3 * len(PROMPTS)


@pytest.mark.parametrize("bound", [100_000, 20_000, 6_000])
def test_pictures_keep_to_the_bound_and_the_newest_stays(tmp_path: Path, bound: int) -> None:
    grids = {samples: make_grid(tmp_path, samples, PROMPTS, None, samples / 100) for samples in range(1, 31)}
    album = make_album([grids], bound)
    assert sum(map(len, album.pictures.values())) <= bound
    shown = [sheet.samples for sheet in album.sheets[0]]
    assert shown[-1] == 30
    assert shown == sorted(shown)
    assert f"{30 - len(shown)} grids" in album.note


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"grids: .* name fewer runs"):
        make_album([{1: make_grid(tmp_path, 1, PROMPTS, None, 0.0)}], 10)


def test_titles_are_readable() -> None:
    titles = {"student 4": "student, 4 steps", "student 1": "student, 1 step", "finetuned": "finetuned",
              "64x96 teacher 25": "64x96 teacher, 25 steps"}  # fmt: skip
    assert {title: readable_title(title) for title in titles} == titles
