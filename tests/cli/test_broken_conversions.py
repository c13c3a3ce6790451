"""Whatever a conversion cannot be made from, or into, is one line before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.system.ownership import claim_folder
from tests.convert.runs import GOLDEN, SMALL

TEACHER = str(GOLDEN / "teacher")
EMBEDDED = "stages/tiny/model"


def words(out: Path, *more: str, base: Path | str = GOLDEN, model: str = TEACHER) -> list[str]:
    return ["convert", model, "--base", str(base), "--out", str(out), *SMALL, *more]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the golden run that a test may break, with the cache but without the pictures of classes."""
    folder = tmp_path / "base"
    shutil.copytree(GOLDEN / "cache", folder / "cache")
    shutil.copytree(GOLDEN / "distill", folder / "distill")
    shutil.copy(GOLDEN / "cache.yaml", folder)
    return folder


def change_origin(base: Path, **changed: object) -> None:
    file = base / "distill" / "origin.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_a_model_is_named_once(tmp_path: Path, refused: Callable[..., str]) -> None:
    refused(["convert"], "which model?")
    refused(["convert", "--base", str(GOLDEN), "--out", str(tmp_path / "out")], "which model?", "--mix")
    refused(words(tmp_path / "out", "--mix", "a:.5"), TEACHER, "a:.5", "leave one of them out")
    refused(["convert", TEACHER, "--out", str(tmp_path / "out")], "base", "--base")
    refused(["convert", TEACHER, "--base", str(GOLDEN)], "out", "--out")
    refused(words(tmp_path / "out", model="nowhere/model"), "nowhere/model")


def test_a_base_is_a_run_with_a_checkpoint_of_a_velocity_student(
    tmp_path: Path, base: Path, refused: Callable[..., str]
) -> None:
    refused(words(tmp_path / "out", base=tmp_path / "none"), str(tmp_path / "none"), "no run lies here")
    refused(words(tmp_path / "out", base=EMBEDDED), EMBEDDED, "no run lies here")
    change_origin(base, target="vp_v")
    refused(words(tmp_path / "out", base=base), "vp_v", str(base / "distill"))
    shutil.rmtree(base / "distill" / "checkpoints")
    refused(words(tmp_path / "out", base=base), "no checkpoint")
    refused(words(tmp_path / "out", base=base / "distill"), "no checkpoint")


def test_a_base_whose_teacher_is_gone_or_another_says_how_to_name_it(
    tmp_path: Path, base: Path, refused: Callable[..., str]
) -> None:
    change_origin(base, teacher=str(tmp_path / "moved"), teacher_path=str(tmp_path / "moved"))
    refused(words(tmp_path / "out", base=base), str(tmp_path / "moved"), "--base-teacher")
    refused(words(tmp_path / "out", "--base-teacher", EMBEDDED, base=base), "unet", "changed", "--base-teacher")


def test_another_anatomy_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    refused(words(tmp_path / "out", model=EMBEDDED), "the fine-tune", "unet")


@pytest.mark.parametrize("place", ["", "distill", "distill/inside", "cache", "cache/data/inside"])
@pytest.mark.parametrize("named", ["", "distill"])
def test_the_base_is_never_written_to(
    tmp_path: Path, base: Path, place: str, named: str, refused: Callable[..., str]
) -> None:
    refused(words(base / place, base=base / named), f"--out {base / place}", "the base run")
    (tmp_path / "link").symlink_to(base)
    refused(words(tmp_path / "link" / place, base=base / named), "the base run")


@pytest.mark.parametrize(("place", "kind"), [("distill", "run"), ("cache", "cache"), ("teacher", "model")])
def test_a_run_a_cache_and_a_model_are_no_folder_to_write_into(
    tmp_path: Path, place: str, kind: str, refused: Callable[..., str]
) -> None:
    other = Path(shutil.copytree(GOLDEN / place, tmp_path / "other" / place))
    refused(words(other), f"--out {other}", f"is itself a {kind}")


def test_a_difference_that_means_nothing_is_refused_first(tmp_path: Path, refused: Callable[..., str]) -> None:
    fine_tune = Path(shutil.copytree(TEACHER, tmp_path / "fine_tune"))
    schedule = fine_tune / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), "beta_end": 0.02}))
    for more in ([], ["--plan"]):
        refused(words(tmp_path / "out", "--start", "delta", *more, model=str(fine_tune)), "--start delta", "schedule")


def test_a_folder_with_another_run_is_refused(tmp_path: Path, base: Path, refused: Callable[..., str]) -> None:
    refused(words(base), str(base / "distill"), "no conversion", "--out")
    start = tmp_path / "out" / "distill" / "start.json"
    start.parent.mkdir(parents=True)
    start.write_text("{")
    refused(words(tmp_path / "out"), str(start), "remove it")
    start.write_text(json.dumps({"made_from": {"seed": 7}}))
    refused(words(tmp_path / "out"), str(start), "another conversion", "seed was 7, is 1", "--out")
    start.unlink()
    shutil.copytree(base / "cache", tmp_path / "out" / "cache")
    refused(words(tmp_path / "out"), str(tmp_path / "out" / "cache"))
    (tmp_path / "file").write_text("")
    refused(words(tmp_path / "file"), str(tmp_path / "file"))


def test_a_folder_in_which_a_process_works_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    with claim_folder(tmp_path / "out" / "distill", "train in"):
        refused(words(tmp_path / "out"), str(tmp_path / "out" / "distill"), "works here")


def test_a_foreign_file_in_the_place_of_an_export_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    foreign = tmp_path / "out" / "distill" / "export" / "teacher-flow.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    refused(words(tmp_path / "out"), str(foreign))


def test_prompts_are_the_bases_or_named(tmp_path: Path, base: Path, refused: Callable[..., str]) -> None:
    (base / "cache.yaml").write_text("cache_teacher: {run: x, teacher: y, prompts: {source: stars}}")
    refused(words(tmp_path / "out", base=base), str(base / "cache.yaml"), "stars")
    (base / "cache.yaml").unlink()
    refused(words(tmp_path / "out", base=base), str(base / "cache.yaml"), "--prompts.source")
    missing = ["--prompts.source", "file", "--prompts.path", str(tmp_path / "none.txt")]
    refused(words(tmp_path / "out", *missing), "none.txt")


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--render.sizes", "[{size: 128x64, share: 1}]"], "128x64"),
        (["--render.sizes", "[{size: 64x64, share: 1}, {size: 64x64, share: 1}]"], "64x64"),
        (["--train.accumulate", "3"], "train.accumulate"),
        (["--gate", "0"], "gate"),
        (["--start", "copy"], "start"),
        (["--count", "0"], "count"),
        (["--render.tail", "faithful"], "--render.tail"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tmp_path: Path, option: list[str], named: str, refused: Callable[..., str]
) -> None:
    refused(words(tmp_path / "out", *option), named)
