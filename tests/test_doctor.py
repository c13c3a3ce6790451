"""`sollune doctor` tells on one page what a teacher is, and its figures are those of the commands that follow."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from configs.values import PictureSize
from stages import __main__ as cli
from stages.sampling.grids import read_settings
from tests.single_files import ldm_tensors, saved
from tests.v_teachers import EMBEDDED

SIZES = "[{size: 64x64, share: 1}, {size: 64x96, share: 3}]"
MAX_LINES = 60


def page_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    code = cli.main(["doctor", *words, "--sampler.steps", "2"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert len(printed.out.splitlines()) <= MAX_LINES
    return printed.out


def test_the_page_tells_files_parts_schedule_prediction_and_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sheet = tmp_path / "page.png"
    page = page_of([str(EMBEDDED), "--render.sizes", SIZES, "--out", str(sheet)], capsys)
    for part in ("unet", "vae", "text_encoder"):
        assert re.search(rf"{part} +[\d,]+ B  [0-9a-f]{{12}}", page)
        assert re.search(rf"{part} +[\d,]+ parameters, stored as F16, all finite", page)
    for text in (
        "1000 steps, epsilon", "0.99915 to 0.00466", "predicts epsilon (stated by its files, and measured)",
        "two small birds", "64x96", "30,418 bytes a prompt", "adamw_8bit", "torch", "nothing stands against it",
    ):  # fmt: skip
        assert text in page
    settings = read_settings(sheet)
    assert settings["doctor"]["render"]["sizes"][1]["size"] == str(PictureSize(64, 96))


def test_without_out_no_file_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = EMBEDDED.absolute()
    monkeypatch.chdir(tmp_path)
    page_of([str(teacher)], capsys)
    assert list(tmp_path.iterdir()) == []


def test_of_a_single_file_the_page_tells_what_was_measured_and_what_is_used(
    teachers_by_prediction: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "v, zero terminal SNR"
    file = saved(tmp_path / "model.safetensors", ldm_tensors(teachers_by_prediction[name]))
    page = page_of([str(file), "--teacher.config", str(EMBEDDED)], capsys)
    assert "its files state nothing" in page
    assert "predicts v_prediction with zero terminal SNR (measured, as its files state nothing" in page
    assert (
        "1000 steps, v_prediction; signal share 0.99915 to 0.00000 (zero terminal SNR); last time s = 1.00000" in page
    )


def test_print_config_and_help_are_those_of_any_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", str(EMBEDDED), "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["doctor"]["teacher"]["location"] == str(EMBEDDED)
    file = tmp_path / "doctor.yaml"
    file.write_text(yaml.safe_dump(config))
    assert cli.main(["doctor", "--config", str(file), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == config
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "--teacher.prediction" in capsys.readouterr().out
