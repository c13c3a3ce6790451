"""Files as users have them, through the real commands: what is broken is refused in one line, what is good is read."""

import io
import json
import os

import pytest
from PIL import Image

from stages import __main__ as cli
from tests.cli.test_broken_teachers import caching, content
from tests.cli.test_broken_texts import classes, lines, photographs, table

PIPED = ("model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json")


def instead_of(name, make):
    def change(teacher):
        (teacher / name).unlink()
        make(teacher / name)

    return change


def duplicate_key(teacher):
    path = teacher / "unet/config.json"
    path.write_text(path.read_text().replace('"in_channels": 4', '"in_channels": 9, "in_channels": 4'))


TEACHERS = {
    **{f"a pipe for {name}": (instead_of(name, os.mkfifo), [name, "a pipe"]) for name in PIPED},
    "a folder for merges": (instead_of("tokenizer/merges.txt", os.mkdir), ["tokenizer/merges.txt", "a folder"]),
    "merges in a circle": (
        instead_of("tokenizer/merges.txt", lambda path: path.symlink_to(path.name)),
        ["tokenizer/merges.txt", "symbolic links"],
    ),
    "weights whose link leads nowhere": (
        instead_of("unet/diffusion_pytorch_model.safetensors", lambda path: path.symlink_to("../../blobs/00")),
        ["unet/diffusion_pytorch_model.safetensors", "does not exist", "../../blobs/00"],
    ),
    "a duplicate key": (duplicate_key, ["unet/config.json", "in_channels", "is a duplicate key"]),
    "a config of absurd depth": (content("vae/config.json", "[" * 100_000), ["vae/config.json", "nested too deep"]),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teachers_file_that_is_none_is_refused_by_name(name, teacher, tmp_path, refused):
    change, named = TEACHERS[name]
    change(teacher)
    refused(caching(tmp_path / "run", teacher), *named)


def test_weights_of_another_name_are_refused_with_the_way_out(teacher, tmp_path, refused):
    weights = teacher / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("unet.safetensors"))
    refused(caching(tmp_path / "run", teacher), "unet.safetensors", "rename")


def animation(kind):
    stored = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(stored, format=kind, save_all=True, append_images=frames[1:])
    return stored.getvalue()


TABLE = {
    "an animation of webp": photographs({"a.webp": animation("WEBP")}, "a.webp", "an animation of 2 pictures"),
    "an animation of png": photographs({"a.png": animation("PNG")}, "a.png", "an animation of 2 pictures"),
    "a gif that is named png": photographs({"a.png": animation("GIF")}, "a.png", "its content is no png, jpg or webp"),
    "a picture of nothing": photographs({"a.jpg": b""}, "a.jpg", "is empty"),
    "a page of HTML": photographs({"a.jpg": "<html>"}, "a.jpg", "its content is no png, jpg or webp"),
    "a caption for other programs": photographs(
        {"a.png": None, "a.caption": "a zork"}, "a.caption", "rename it a.txt", caption=False
    ),
    "a name of two lines": photographs({"a\nb.png": None}, "'a\\nb.png'", "several lines", "rename it"),
    "a name that is not UTF-8": photographs({os.fsdecode(b"a\xff.png"): None}, "byte FF", "rename it"),
    "a class of blanks": classes("classes: [{name: ' ', pattern: a, priority: top}]", "name", "a word"),
    "a caption of blanks": classes("classes: [{name: a, images: ., caption: ' ', priority: top}]", "caption", "a word"),
    "a book in one line": lines("l.txt", "a cat " * 100_000, "1 with more than 65,536 characters", "l.txt:1"),
    "a book in JSON": table("t.jsonl", json.dumps({"text": "a cat " * 100_000}), "65,536 characters", "t.jsonl:1"),
    "Excel's note of semicolons": table("t.csv", "sep=;\r\ntext;kind\r\na cat;x\r\n", "t.csv:1", "sep=;", "remove"),
    "Excel's note of commas": table("t.csv", "sep=,\r\ntext,kind\r\na cat,x\r\n", "t.csv:1", "sep=,", "remove"),
}


@pytest.mark.parametrize("name", TABLE)
def test_users_files_that_cannot_be_used_are_refused(name, refused, tmp_path):
    words, named = TABLE[name](tmp_path)
    refused(words, *named)


def test_what_windows_hides_in_a_folder_is_left_out_and_reported(tmp_path, capsys):
    words, _ = photographs({"a.png": None, "Thumbs.db": b"x", "desktop.ini": b"x"})(tmp_path)
    assert cli.main(words) == 0
    assert "2 hidden files left out (the first: Thumbs.db)" in capsys.readouterr().out


def test_a_cameras_two_pictures_in_one_jpeg_are_read(tmp_path):
    words, _ = photographs({"a.jpg": animation("MPO")})(tmp_path)
    assert cli.main(words) == 0
