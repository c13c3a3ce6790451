"""Laws of photographs: how an untrusted file is decoded, and the message about each fault."""

import os
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from configs.values import PictureSize
from stages.classes.photographs import (
    crop_and_resize,
    crop_lines,
    hidden_file_lines,
    list_photographs,
    load_photographs,
    nearest_size,
    open_picture,
    share_cut,
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
    picture = crop_and_resize(opened(save(tmp_path / "a.png", image)), PictureSize(8, 8))
    assert picture.shape == (3, 8, 8)
    torch.testing.assert_close(picture[:, 3:5, 3:5], torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 2, 2))


@pytest.mark.parametrize(
    ("photograph", "nearest"),
    [
        ("4000x3000", "768x512"),
        ("3000x4000", "512x768"),
        ("4000x3600", "1024x1024"),
        ("560x500", "512x512"),
        ("100x1", "768x512"),
        ("1x100", "512x768"),
        ("640x640", "512x512"),
        ("1000x1000", "1024x1024"),
        ("627x512", "512x512"),  # the aspects 1 and 1.5 meet at their geometric mean, 1.2247
        ("628x512", "768x512"),
    ],
)
def test_a_photograph_goes_to_the_size_of_the_nearest_aspect(photograph: str, nearest: str) -> None:
    sizes = [PictureSize.parse(text) for text in ("512x512", "512x768", "768x512", "1024x1024")]
    for order in (sizes, sizes[::-1]):
        assert str(nearest_size(PictureSize.parse(photograph), order)) == nearest


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (75, 75), (31, 97), (97, 31)])
@pytest.mark.parametrize("size", ["16x24", "24x16", "16x16", "24x40"])
def test_a_photograph_is_cut_at_both_ends_alike_and_never_stretched(width: int, height: int, size: str) -> None:
    """Of coordinates painted as colours, the crop holds the middle, with one scale in both directions."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    painted = np.stack([x, y, 0 * x], axis=2) * 255
    target = PictureSize.parse(size)
    picture = crop_and_resize(Image.fromarray(painted.round().astype(np.uint8)), target)
    assert picture.shape == (3, target.height, target.width)
    across, down = picture[0].mean(0) * width, picture[1].mean(1) * height  # pixels of the photograph
    inner_x, inner_y = across[2:-2], down[2:-2]
    assert float(across.mean()) == pytest.approx(width / 2, abs=width / 100)
    assert float(down.mean()) == pytest.approx(height / 2, abs=height / 100)
    scale_x = float(inner_x[-1] - inner_x[0]) / (len(inner_x) - 1)
    scale_y = float(inner_y[-1] - inner_y[0]) / (len(inner_y) - 1)
    assert scale_x == pytest.approx(scale_y, rel=0.05)
    kept = scale_x * target.width * scale_y * target.height / (width * height)
    assert 1 - kept == pytest.approx(share_cut(PictureSize(width, height), target), abs=0.05)


def test_what_is_cut_is_told_with_the_worst_photograph(tmp_path: Path) -> None:
    for name, sides in (("a", (64, 64)), ("b", (128, 64)), ("c", (640, 64)), ("d", (65, 64))):
        save(tmp_path / f"{name}.png", Image.new("RGB", sides))
    photographs = list_photographs(spec(tmp_path))
    assert [str(one.upright_size) for one in photographs] == ["64x64", "128x64", "640x64", "65x64"]
    square, wide = PictureSize(64, 64), PictureSize(128, 64)
    assert crop_lines("zorks", photographs, [square]) == [
        "class 'zorks': images: 3 of 4 photographs lose their edges (4 to 64x64), at most 90 % of the area "
        "(c.png, 640x64)"
    ]
    assert crop_lines("zorks", photographs, [square, wide]) == [
        "class 'zorks': images: 2 of 4 photographs lose their edges (2 to 64x64, 2 to 128x64), at most 80 % of the "
        "area (c.png, 640x64)"
    ]
    assert crop_lines("zorks", photographs[:2], [square, wide]) == []


def test_a_photograph_is_measured_as_it_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    save(tmp_path / "a.jpg", Image.new("RGB", (60, 20)), exif=exif)
    assert list_photographs(spec(tmp_path))[0].upright_size == PictureSize(20, 60)


def test_a_photograph_that_changes_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png")
    photographs = list_photographs(spec(tmp_path))
    assert load_photographs(photographs, PictureSize(8, 8)).shape == (1, 3, 8, 8)
    save(file, Image.new("RGB", (6, 4), "blue"))
    with pytest.raises(Refused, match=r"a\.png: changed while it was read"):
        load_photographs(photographs, PictureSize(8, 8))
