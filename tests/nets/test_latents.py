"""Picture sizes of a model: the unit, the shape of latents, and the refusal of other sizes."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from configs.values import PictureSize
from stages.nets.latents import MAX_NATIVE_SIDES, LatentGeometry
from stages.nets.run_folder import ORIGIN_FILE, Origin
from stages.system.refusal import Refused

SD15, TINY = LatentGeometry(4, 64, 8), LatentGeometry(4, 8, 8)


@pytest.mark.parametrize(
    ("native_side", "unit"), [(64, 64), (8, 8), (96, 64), (128, 64), (32, 32), (16, 16), (60, 48), (12, 8), (4, 8)]
)
def test_the_unit_is_an_eighth_of_the_native_side_or_the_next_divisor_below(native_side: int, unit: int) -> None:
    geometry = LatentGeometry(4, native_side, 8)
    assert geometry.unit == unit
    assert geometry.unit <= 64
    assert geometry.unit % geometry.factor == 0
    assert geometry.is_valid(geometry.native_size)


def test_latents_are_height_before_width() -> None:
    assert SD15.latent_shape() == (4, 64, 64)
    assert SD15.latent_shape(PictureSize.parse("512x768")) == (4, 96, 64)
    assert SD15.size_of_latents(96, 64) == PictureSize(512, 768)


@pytest.mark.parametrize("text", ["64x64", "512x768", "1024x512", "2048x2048", "576x64"])
def test_every_multiple_of_the_unit_is_valid(text: str) -> None:
    assert SD15.check_size(PictureSize.parse(text), "render.sizes") == PictureSize.parse(text)


@pytest.mark.parametrize(
    ("geometry", "text", "near"),
    [
        (SD15, "500x700", ["512x704", "448x704"]),
        (SD15, "512x770", ["512x768", "512x832"]),
        (SD15, "1x1", ["64x64"]),
        (SD15, "99999x99999", ["2048x2048"]),
        (SD15, "512x2112", ["512x2048"]),
        (TINY, "64x60", ["64x64", "64x56"]),
        (TINY, "512x768", ["256x256"]),
        (TINY, "81x80", ["80x80", "88x80"]),
    ],
)
def test_another_size_is_refused_with_the_nearest_valid_ones(
    geometry: LatentGeometry, text: str, near: list[str]
) -> None:
    size = PictureSize.parse(text)
    with pytest.raises(Refused, match=f"sizes: {text}: .* - take {re.escape(' or '.join(near))}$"):
        geometry.check_size(size, "render.sizes")
    assert list(map(str, geometry.nearest_sizes(size))) == near
    assert all(map(geometry.is_valid, geometry.nearest_sizes(size)))


def test_no_valid_size_is_nearer_than_those_named() -> None:
    longest = MAX_NATIVE_SIDES * 8
    valid = [PictureSize(8 * w, 8 * h) for w in range(1, longest + 1) for h in range(1, longest + 1)]
    for size in (PictureSize(1, 99), PictureSize(300, 3), PictureSize(77, 255), PictureSize(68, 68)):
        by_distance = sorted(abs(one.width - size.width) + abs(one.height - size.height) for one in valid)
        named = [abs(one.width - size.width) + abs(one.height - size.height) for one in TINY.nearest_sizes(size)]
        assert named == by_distance[: len(named)]


def test_an_origin_keeps_its_sizes_and_one_of_before_has_the_native_one(tmp_path: Path) -> None:
    origin = Origin("folder", {"unet": "0" * 64}, "hold", "1" * 64, sizes=("64x96", "64x64"))
    origin.save(tmp_path)
    assert Origin.open(tmp_path) == origin
    assert Origin.open(tmp_path).learnt_sizes(TINY.native_size) == (PictureSize(64, 96), PictureSize(64, 64))
    before = {key: value for key, value in asdict(origin).items() if key != "sizes"}
    (tmp_path / ORIGIN_FILE).write_text(json.dumps(before))
    assert Origin.open(tmp_path).learnt_sizes(TINY.native_size) == (PictureSize(64, 64),)


@pytest.mark.parametrize("sizes", [["64 x 64"], ["0x64"], "64x64", [64], None])
def test_an_origin_with_other_sizes_is_refused(tmp_path: Path, sizes: object) -> None:
    Origin("folder", {"unet": "0" * 64}, "hold", "1" * 64).save(tmp_path)
    stored = json.loads((tmp_path / ORIGIN_FILE).read_text())
    (tmp_path / ORIGIN_FILE).write_text(json.dumps({**stored, "sizes": sizes}))
    with pytest.raises(Refused, match=r"origin\.json: cannot be read"):
        Origin.open(tmp_path)
