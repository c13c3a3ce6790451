"""Laws of `sollune classes suggest`."""

from pathlib import Path

import pytest

from stages.classes.cached import spread_evenly
from stages.classes.classes_command import main
from stages.classes.specification import load_classes
from stages.classes.suggestion import group_by_level
from stages.system.refusal import Refused

FEW = ["--probe", "2", "--records", "2", "--sampler.steps", "1"]


def test_a_suggestion_is_a_class_file_with_every_class_and_its_measurements(
    distill_folder: Path, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "suggested.yaml"
    options = ["suggest", str(distill_folder), "--config", str(config_file), "--level", "2", "--out", str(out), *FEW]
    assert main(options) == 0
    assert sorted(spec.pattern or "" for spec in load_classes(out).classes) == ["shape/ring", "shape/star"]
    assert out.read_text().count("paired error 0.") == 2
    assert "±" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"suggested\.yaml: is there already"):
        main(options)


def test_a_level_with_one_class_is_refused(distill_folder: Path, config_file: Path, tmp_path: Path) -> None:
    options = ["suggest", str(distill_folder), "--config", str(config_file), "--out", str(tmp_path / "x.yaml"), *FEW]
    with pytest.raises(Refused, match=r"--level 1: .* holds one class there, 'shape/\*' - go deeper"):
        main(options)
    assert not (tmp_path / "x.yaml").exists()


def test_a_level_is_a_depth_and_names_are_no_globs() -> None:
    records = {"a/b/c": [2], "a/b/d": [0], "a/e": [1], "f": [3], "g*/h": [4]}
    assert group_by_level(records, 1) == {"a/*": [0, 1, 2], "f": [3], "g[*]/*": [4]}
    assert group_by_level(records, 2) == {"a/b/*": [0, 2], "a/e": [1], "f": [3], "g[*]/h": [4]}


def test_records_are_evenly_spaced() -> None:
    assert spread_evenly(range(10), 3) == [0, 3, 6]
    assert spread_evenly([7, 8], 3) == [7, 8]


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(Refused, match="classes shwo: unknown command - did you mean show"):
        main(["shwo"])
