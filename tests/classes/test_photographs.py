"""Laws of photographs: how an untrusted file is decoded, and the message about each fault."""

import os
import struct
import zlib
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from stages.classes.photographs import (
    crop_and_resize,
    hidden_file_lines,
    list_photographs,
    load_photographs,
    open_picture,
)
from stages.classes.specification import ClassSpec
from stages.system.refusal import Refused


def spec(folder: Path, caption: str | None = "a zork") -> ClassSpec:
    return ClassSpec(name="zorks", priority="top", images=folder, caption=caption)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    (image or Image.new("RGB", (6, 4), "red")).save(path, **options)  # type: ignore[arg-type]
    return path


def opened(path: Path) -> Image.Image:
    return open_picture(path.read_bytes(), path)


def test_captions_are_beside_the_files_and_the_caption_of_the_class_is_for_the_rest(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp"):
        save(tmp_path / name)
    (tmp_path / "c.txt").write_text("  a zork\n on a   tree ")
    photographs = list_photographs(spec(tmp_path))
    assert [(one.file.name, one.text) for one in photographs] == [
        ("a.JPG", "a zork"),
        ("b.png", "a zork"),
        ("c.webp", "a zork on a tree"),
    ]
    assert {one.class_name for one in photographs} == {"photograph@zorks"}


def test_a_caption_loses_its_byte_order_mark_and_may_end_in_capitals(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.JPEG"):
        save(tmp_path / name)
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfa zork\r\nin a tree")
    assert [one.text for one in list_photographs(spec(tmp_path))] == ["a zork in a tree", "a zork"]


def test_hidden_files_are_not_used_and_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in (".DS_Store", "._a.png", ".b.txt"):
        (tmp_path / name).write_bytes(b"?")
    assert len(list_photographs(spec(tmp_path))) == 1
    assert hidden_file_lines(spec(tmp_path)) == [
        "class 'zorks': images: 3 hidden files left out (the first: .DS_Store)"
    ]


def test_the_seed_of_a_photograph_is_its_contents_alone(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / f"{folder}.png")
    one, other = (list_photographs(spec(tmp_path / folder))[0] for folder in ("one", "other"))
    assert (one.seed, one.sha256) == (other.seed, other.sha256)


def missing_caption(folder: Path) -> str:
    save(folder / "a.png")
    return r"a\.png: has no caption - write a\.txt beside it, or `caption` of class 'zorks'"


def empty_caption(folder: Path) -> str:
    save(folder / "a.png")
    (folder / "a.txt").write_text(" \n")
    return r"a\.txt: is empty"


def caption_of_bytes(folder: Path) -> str:
    save(folder / "a.png")
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    return r"a\.txt: is not UTF-8"


def no_picture(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"hello")
    return r"a\.png: not a picture that can be read"


def another_format_in_disguise(folder: Path) -> str:
    save(folder / "a.png", format="GIF")
    return r"a\.png: not a picture that can be read"


def cut(folder: Path) -> str:
    image = Image.effect_noise((64, 64), 50)
    content = save(folder / "a.jpg", image).read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2])
    return r"a\.jpg: not a picture that can be read \(.*truncated"


def foreign_file(folder: Path) -> str:
    save(folder / "a.gif")
    return r"a\.gif: not a png, jpg or webp file"


def caption_with_two_endings(folder: Path) -> str:
    save(folder / "a.png")
    (folder / "a.png.txt").write_text("a zork")
    return r"a\.png\.txt: a caption without a picture - that of a\.png is named a\.txt"


def caption_in_capitals(folder: Path) -> str:
    save(folder / "a.png")
    (folder / "A.txt").write_text("a zork")
    return r"A\.txt: a caption without a picture - that of a\.png is named a\.txt"


def caption_of_two_pictures(folder: Path) -> str:
    for name in ("a.png", "a.jpg"):
        save(folder / name)
    (folder / "a.txt").write_text("a zork")
    return r"a\.txt: is the caption of a\.jpg and a\.png"


def caption_that_is_a_link_to_nothing(folder: Path) -> str:
    save(folder / "a.png")
    (folder / "a.txt").symlink_to("gone.txt")
    return r"a\.txt does not exist \(a link to gone\.txt\)"


def caption_that_is_a_pipe(folder: Path) -> str:
    save(folder / "a.png")
    os.mkfifo(folder / "a.txt")
    return r"a\.txt: is a pipe"


def folder_inside(folder: Path) -> str:
    save(folder / "a.png")
    (folder / "more").mkdir()
    return r"more: is a folder, and only files right in"


def empty_folder(folder: Path) -> str:
    return "class 'zorks': images: .* holds no png"


def sixteen_bits(folder: Path) -> str:
    save(folder / "a.png", Image.new("I;16", (4, 4), 40_000))
    return r"a\.png: has more than 8 bits a channel"


def bomb(folder: Path, side: int = 40_000) -> str:
    """A file of seventy bytes whose header declares more than a gigabyte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return r"a\.png: too many pixels"


def huge(folder: Path) -> str:
    bomb(folder, 8_500)  # below what Pillow itself calls a bomb
    return r"a\.png: 8500 x 8500 pixels, at most \d+ are read - make it smaller"


FAULTS = [missing_caption, empty_caption, caption_of_bytes, no_picture, another_format_in_disguise, cut, foreign_file]
FAULTS += [caption_with_two_endings, caption_in_capitals, caption_of_two_pictures, caption_that_is_a_link_to_nothing]
FAULTS += [caption_that_is_a_pipe, folder_inside]
FAULTS += [empty_folder, sixteen_bits, bomb, huge]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_that_names_the_file(fault, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    message = fault(tmp_path)
    with pytest.raises(Refused, match=message) as refusal:
        list_photographs(spec(tmp_path, None if "caption" in fault.__name__ else "a zork"))
    assert "\n" not in str(refusal.value)


def test_a_missing_folder_is_refused_with_its_class(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"class 'zorks': images: .*nowhere is no folder"):
        list_photographs(spec(tmp_path / "nowhere"))


def test_a_damaged_file_is_opened_or_refused_and_never_anything_else(tmp_path: Path) -> None:
    rng, image = Random(0), Image.effect_noise((24, 24), 80).convert("RGB")
    for suffix in ("png", "jpg", "webp"):
        whole = save(tmp_path / f"a.{suffix}", image).read_bytes()
        refused = 0
        for _ in range(150):
            bad = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
            for _ in range(rng.choice((0, 1, 8))):
                if bad:
                    bad[rng.randrange(len(bad))] = rng.randrange(256)
            try:
                assert open_picture(bytes(bad), tmp_path / "a").mode == "RGB"
            except Refused:
                refused += 1
        assert refused > 30


def test_a_picture_is_turned_by_its_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[274] = 6  # turn clockwise: the left side comes to the top
    turned = opened(save(tmp_path / "a.png", image, exif=exif))
    assert turned.size == (4, 8)
    assert [turned.getpixel((1, y)) for y in (1, 6)] == [(255, 255, 255), (0, 0, 0)]


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    rgb = opened(save(tmp_path / "a.png", image))
    assert [rgb.getpixel((x, 1)) for x in (0, 3)] == [(255, 255, 255), (255, 0, 0)]


def test_the_middle_square_is_kept_and_resampled(tmp_path: Path) -> None:
    image = Image.new("RGB", (120, 40), "black")
    image.paste((255, 0, 51), (40, 0, 80, 40))
    picture = crop_and_resize(opened(save(tmp_path / "a.png", image)), 8)
    assert picture.shape == (3, 8, 8)
    torch.testing.assert_close(picture[:, 3:5, 3:5], torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 2, 2))


def test_a_photograph_that_changes_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png")
    photographs = list_photographs(spec(tmp_path))
    assert load_photographs(photographs, 8).shape == (1, 3, 8, 8)
    save(file, Image.new("RGB", (6, 4), "blue"))
    with pytest.raises(Refused, match=r"a\.png: changed while it was read"):
        load_photographs(photographs, 8)
