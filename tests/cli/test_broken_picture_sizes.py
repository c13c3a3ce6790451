"""Picture sizes that a model has not, through the real commands: each is refused by its text and the nearest ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]
SAMPLE = ["sample", "stages/tiny/model", "a red star", "--steps", "1", "--seeds", "0"]

NOT_A_SIZE = {
    "rubbish": "big",
    "one number": "64",
    "three numbers": "64x64x64",
    "upper case": "64X64",
    "a sign of multiplication": "64×64",
    "spaces": "64 x 64",
    "space before": " 64x64",
    "no height": "64x",
    "no width": "x64",
    "zero": "0x0",
    "zero height": "64x0",
    "a zero before": "064x64",
    "negative": "-64x64",
    "fractional": "64.0x64.0",
    "digits of another script": "٦٤x٦٤",
    "full-width digits": "６４x６４",
    "nothing": "",
    "a list": "[64, 64]",
    "a mapping": "{width: 64, height: 64}",
    "six digits": "640000x64",
    "units": "64pxx64px",
}
OTHER_SIZES = {
    "not a multiple": ("60x64", "multiples of 8 pixels", "64x64 or 56x64"),
    "neither side is": ("100x100", "multiples of 8", "96x96 or 104x104"),
    "one pixel": ("1x1", "multiples of 8", "8x8"),
    "of another model": ("512x768", "up to 256 pixels", "256x256"),
    "huge": ("99999x99999", "up to 256 pixels", "256x256"),
    "huge on one side": ("64x264", "up to 256 pixels", "64x256"),
}


@pytest.mark.parametrize("text", NOT_A_SIZE.values(), ids=NOT_A_SIZE.keys())
def test_sample_refuses_what_is_no_size(text: str, refused: Refused, tmp_path: Path) -> None:
    refused([*SAMPLE, f"--size={text}", "--out", str(tmp_path / "out.png")], "size")


@pytest.mark.parametrize(("text", "reason", "near"), OTHER_SIZES.values(), ids=OTHER_SIZES.keys())
def test_sample_refuses_a_size_that_the_model_has_not(
    text: str, reason: str, near: str, refused: Refused, tmp_path: Path
) -> None:
    refused([*SAMPLE, "--size", text, "--out", str(tmp_path / "out.png")], text, reason, near, "--size")


@pytest.mark.parametrize("text", NOT_A_SIZE.values(), ids=NOT_A_SIZE.keys())
def test_evaluate_refuses_what_is_no_size(text: str, refused: Refused, tmp_path: Path) -> None:
    words = ["evaluate", str(tmp_path / "run"), "--config", "configs/tiny.yaml"]
    refused([*words, "--paired.sizes", "64x64", text] if text else [*words, "--paired.sizes", ""], "sizes")


def test_evaluate_refuses_a_size_named_twice(refused: Refused, tmp_path: Path) -> None:
    words = ["evaluate", str(tmp_path / "run"), "--config", "configs/tiny.yaml", "--paired.sizes"]
    refused([*words, "64x64", "64x96", "64x64"], "64x64 stands there more than once")
