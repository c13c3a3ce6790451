"""Pictures of other sizes than the model's own: the sheets, the command `sollune sample`, and comparison grids."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch import Tensor

from configs.values import PictureSize
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.grids import (
    GridConfig,
    comparison_grid_hook,
    fixed_noises,
    make_contact_sheet,
    make_sheet,
    read_settings,
    to_pil_image,
)
from stages.sampling.models import load_model
from stages.sampling.sample_command import main
from stages.sampling.sampler import Sampler, sample_student, sample_teacher

SIZES = [PictureSize.parse(text) for text in ("64x64", "64x96", "96x64")]
FEW = ["--steps", "2", "--seeds", "1"]
TEXTS = ["a red star", "a long sentence about a small green moon at the left on a black background"]


def sheet_of_one_size(labels: Sequence[str], titles: Sequence[str], columns: Sequence[Tensor]) -> Image.Image:
    """A sheet as it was before there were sizes, of square pictures of up to 128 pixels."""
    images = [
        [Image.fromarray((one.permute(1, 2, 0) * 255).round().byte().numpy()).resize((128, 128), 0) for one in column]
        for column in columns
    ]
    canvas = Image.new("RGB", (180 + len(titles) * 132, 20 + len(labels) * 132), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for j, title in enumerate(titles):
        pen.text((180 + j * 132, 4), title, "black", font)
        for i, image in enumerate(images[j]):
            canvas.paste(image, (180 + j * 132, 20 + i * 132))
    for i, label in enumerate(labels):
        lines = textwrap.wrap(label, 25, max_lines=8, placeholder=" ...")
        pen.text((4, 24 + i * 132), "\n".join(lines), "black", font)
    return canvas


def noise_pictures(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def test_a_sheet_of_one_size_is_as_it_was_to_the_bit() -> None:
    columns = [noise_pictures(2, 64, 64), noise_pictures(2, 64, 64).flip(0), noise_pictures(2, 64, 64) / 2]
    titles = ["teacher", "student", "student as a noise model, whatever it is"]
    expected = sheet_of_one_size(TEXTS, titles, columns)
    assert ImageChops.difference(make_sheet(TEXTS, titles, columns), expected).getbbox() is None


@pytest.mark.parametrize(
    "sides", [[(64, 64), (96, 64), (64, 96)], [(8, 8), (128, 8)], [(512, 64), (64, 512), (512, 512)]]
)
def test_columns_of_several_sizes_lie_side_by_side_in_one_scale(sides: list[tuple[int, int]]) -> None:
    columns = [torch.full((2, 3, height, width), 0.5) for height, width in sides]
    titles = [f"{width}x{height} student 25" for height, width in sides]
    image = make_sheet(TEXTS, titles, columns)
    scale = 2 if max(map(max, sides)) <= 128 else 1
    gray = image.convert("L").point([255 if value == 128 else 0 for value in range(256)])
    high = scale * max(height for height, _ in sides) + 4
    left = 180
    for (height, width), title in zip(sides, titles, strict=True):
        for row in range(2):
            top = 20 + row * high
            box = (left, top, left + scale * width, top + scale * height)
            assert gray.crop(box).getextrema() == (255, 255)
            assert gray.crop((box[2], top, box[2] + 4, box[3])).getextrema() == (0, 0)  # a gap behind it
        left += max(scale * width, 64, int(ImageFont.load_default(12).getlength(title) + 0.999)) + 4
    assert image.size == (left, 20 + 2 * high)


def test_a_contact_sheet_holds_pictures_of_several_sizes_down_to_the_narrowest() -> None:
    pictures = [to_pil_image(torch.full((3, h, w), 0.5), 128) for h, w in ((128, 8), (8, 128), (64, 64), (8, 8))]
    sheet = make_contact_sheet(pictures, ["score 0.1 is below 0.2 - a word"] * 4)
    assert sheet.size == (2 * (256 + 8), 2 * (256 + 8 + 5 * 14))
    assert sheet.getpixel((4, 4)) == (128, 128, 128)
    assert make_contact_sheet(pictures[3:], ["a label of several words"]).size == (64 + 8, 16 + 8 + 5 * 14)


@pytest.mark.parametrize("kind", ["run", "export", "teacher"])
@pytest.mark.parametrize("text", ["64x96", "96x64", "80x80", "8x256"])
def test_sample_makes_pictures_of_the_wanted_size(
    kind: str, text: str, run_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    places = {"run": run_folder, "export": run_folder / "export", "teacher": teacher_folder}
    out, size = tmp_path / "out.png", PictureSize.parse(text)
    assert main([str(places[kind]), *TEXTS, *FEW, "--size", text, "--out", str(out)]) == 0
    assert read_settings(out)["sample"]["size"] == text
    scale = 2 if max(size.width, size.height) <= 128 else 1
    with Image.open(out) as image:
        assert image.size == (180 + max(scale * size.width, 64) + 4, 20 + 2 * (scale * size.height + 4))


def test_the_native_size_is_the_default_and_stands_in_the_metadata(run_folder: Path, tmp_path: Path) -> None:
    sheets = []
    for name, words in (("default", []), ("named", ["--size", "64x64"])):
        main([str(run_folder), "a red star", *FEW, *words, "--out", str(tmp_path / f"{name}.png")])
        sheets.append((tmp_path / f"{name}.png").read_bytes())
        assert read_settings(tmp_path / f"{name}.png")["sample"]["size"] == "64x64"
    assert sheets[0] == sheets[1]


def test_a_run_and_its_export_give_one_picture_at_every_size(run_folder: Path) -> None:
    run, exported = load_model(str(run_folder), "cpu"), load_model(str(run_folder / "export"), "cpu")
    noise = fixed_noises(3, 2, run.latents.latent_shape(SIZES[1]))
    cond, uncond = run.encode(TEXTS), run.encode([""])
    sampler = Sampler(steps=2)
    latents = [sampler.sample(model.field, cond, uncond, noise) for model in (run, exported)]
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-4)
    assert run.decode(latents[0]).shape == exported.decode(latents[1]).shape == (2, 3, 96, 64)


def test_a_grid_has_the_columns_of_each_size_and_one_of_the_native_size_is_as_before(
    teacher: Teacher, student: Student, tmp_path: Path
) -> None:
    config = GridConfig(prompts=tuple(TEXTS), sampler=Sampler(steps=5))
    native = teacher.components.native_size
    for name, sizes in (("none", ()), ("native", (native,)), ("three", SIZES), ("one", SIZES[1:2])):
        comparison_grid_hook(teacher, config, tmp_path / name, sizes)(64, student)
    file = "000000064.png"
    assert (tmp_path / "none" / file).read_bytes() == (tmp_path / "native" / file).read_bytes()
    assert "sizes" not in read_settings(tmp_path / "none" / file)
    assert read_settings(tmp_path / "three" / file)["sizes"] == ["64x64", "64x96", "96x64"]
    assert read_settings(tmp_path / "one" / file)["sizes"] == ["64x96"]
    with Image.open(tmp_path / "three" / file) as image, Image.open(tmp_path / "none" / file) as before:
        assert image.size[1] == 20 + 2 * (192 + 4)
        shown = before.crop((180, 20, 180 + 128, 20 + 128))  # the teacher's first picture
        assert ImageChops.difference(image.crop((180, 20, 180 + 128, 20 + 128)), shown).getbbox() is None
    # The second group is that of 64x96: its first column is the teacher's, from the noises of that shape.
    noise = fixed_noises(0, 2, teacher.components.latent_shape(SIZES[1]))
    cond, few = teacher.encode_texts(TEXTS), Sampler(steps=4)
    expected = [
        teacher.decode_latents(sample_teacher(teacher, cond, teacher.uncond, noise, config.sampler)),
        teacher.decode_latents(sample_student(student, cond, teacher.uncond, noise, config.sampler)),
        teacher.decode_latents(sample_student(student, cond, teacher.uncond, noise, few)),
    ]
    alone = make_sheet(TEXTS, ["teacher 5", "student 5", "student 4"], expected)
    with Image.open(tmp_path / "one" / file) as image:
        assert ImageChops.difference(image, alone).getbbox() is None


@pytest.mark.parametrize(
    ("size", "rows"), [("64x64", 64), ("32x32", 64), ("64x96", 42), ("128x128", 16), ("512x4096", 1)]
)
def test_as_many_fewer_pictures_are_sampled_together_as_they_are_larger(size: str, rows: int) -> None:
    assert Sampler().scaled_to(PictureSize.parse(size), PictureSize(64, 64)).batch_size == rows
