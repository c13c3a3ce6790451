"""The training for few steps on broken input: refused in one line before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from configs.load import load
from stages import __main__ as cli
from stages import distill
from tests.fast.runs import CONFIG, FEW_PROMPTS, GRID, command

Break: TypeAlias = Callable[[Path], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a cache of two windows and a distilled student."""
    run = tmp_path_factory.mktemp("made") / "run"
    windows = ("--render.states.windows", "2")
    assert cli.main(["cache-teacher", *CONFIG, "--run", str(run), *FEW_PROMPTS, *windows]) == 0
    few = ("--david.fusion.formula", "static", "--train.max-samples", "4", "--train.batch-size", "4", *GRID)
    assert cli.main(["distill", *CONFIG, "--run", str(run), *few, "--validation.states", "0"]) == 0
    return run


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def origin(**changes: Any) -> Break:
    def change(run: Path) -> None:
        file = run / "distill/origin.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def nothing(_run: Path) -> None:
    """Only the command line is wrong."""


def other_run(run: Path) -> None:
    """A run of few steps that began otherwise."""
    folder = run / "fast/2/checkpoints/000000004"
    shutil.copytree(run / "distill/checkpoints/000000004", folder)


def not_landed(run: Path) -> None:
    """A cache as it was made before there were landings."""
    shutil.rmtree(run / "cache")
    words = ["cache-teacher", *CONFIG, "--run", str(run), *FEW_PROMPTS, "--render.states.windows", "0"]
    assert cli.main(words) == 0


TABLE: dict[str, tuple[Break, list[str], list[str]]] = {
    "windows that rise": (nothing, ["--windows", "1", "2"], ["windows 1 2", "2 does not follow 1", "4 2 1"]),
    "windows twice": (nothing, ["--windows", "2", "2"], ["windows 2 2", "4 2 1"]),
    "windows that do not divide": (nothing, ["--windows", "3", "2"], ["windows 3", "one of 8 4 2 1"]),
    "no window": (nothing, ["--windows", "0"], ["windows 0", "one of 8 4 2 1"]),
    "windows that no cache has": (nothing, ["--windows", "16"], ["windows 16", "one of 8 4 2 1"]),
    "windows below nothing": (nothing, ["--windows", "-2"], ["windows -2", "one of 8 4 2 1"]),
    "windows in words": (nothing, ["--windows", "four"], ["windows"]),
    "more windows than the cache has": (nothing, ["--windows", "4"], ["windows 4", "of 2 windows", "take one of 2 1"]),
    "windows of which one is too many": (nothing, ["--windows", "4", "2"], ["windows 4", "of 2 windows"]),
    "windows with v prediction": (
        nothing,
        ["--windows", "2", "--target", "vp_v", "--graft", "false"],
        ["target velocity", "vp_v"],
    ),
    "a repository for several runs": (
        nothing,
        ["--windows", "2", "1", "--fast.hub.repo", "a/b"],
        ["fast.hub.repo a/b", "windows are 2"],
    ),
    "a share above all": (nothing, ["--windows", "2", "--fast.landing-share", "1.5"], ["landing_share", "1.5"]),
    "no distilled run": (lambda run: shutil.rmtree(run / "distill"), ["--windows", "2"], ["distill", "COMPLETE"]),
    "an unfinished run": (
        lambda run: (run / "distill/COMPLETE").unlink(),
        ["--windows", "2"],
        ["COMPLETE", "--fast.start"],
    ),
    "a start that is nowhere": (nothing, ["--windows", "2", "--fast.start", "nowhere"], ["nowhere", "COMPLETE"]),
    "a start of another target": (origin(target="vp_v"), ["--windows", "2"], ["predicts vp_v", "velocity"]),
    "a start of another teacher": (origin(teacher_sha256={"unet": "0"}), ["--windows", "2"], ["another teacher"]),
    "a start of as many windows": (
        origin(windows=2, guidance_range=[3, 8]),
        ["--windows", "2"],
        ["windows 2", "has 2 windows", "--fast.start"],
    ),
    "a start of windows that do not divide": (
        origin(windows=3, guidance_range=[3, 8]),
        ["--windows", "2"],
        ["has 3 windows", "no smaller divisor"],
    ),
    "another run in its folder": (other_run, ["--windows", "2"], ["fast/2/checkpoints", "belongs to another run"]),
    "another run in a later folder": (
        lambda run: ((run / "fast").mkdir(), other_run(run), (run / "fast/2").rename(run / "fast/1")),
        ["--windows", "2", "1"],
        ["fast/1/checkpoints", "belongs to another run"],
    ),
    "a foreign file where the export goes": (
        lambda run: (
            (run / "fast/2/export/diffusers").mkdir(parents=True),
            (run / "fast/2/export/diffusers/model_index.json").write_text("{}"),
        ),
        ["--windows", "2"],
        ["fast/2/export"],
    ),
    "a cache without landings": (not_landed, ["--windows", "2"], ["cache", "schema 2", "render.states.windows"]),
    "a batch that cannot be split": (
        nothing,
        ["--windows", "2", "--fast.train.accumulate", "3"],
        ["fast.train.batch_size = 4", "x fast.train.accumulate = 3 micro-batches"],
    ),
    "a batch that several processes cannot share": (
        nothing,
        ["--windows", "2", "--processes", "3"],
        ["fast.train.batch_size = 4", "choose a multiple of 3"],
    ),
    "batches by pixels that cannot be split": (
        nothing,
        ["--windows", "2", "--fast.train.batch-pixels", "4096", "--fast.train.accumulate", "2"],
        ["fast.train.batch_pixels = 4096", "take 8192"],
    ),
    "samples of the other training": (
        nothing,
        ["--windows", "2", "--train.max-samples", "8"],
        ["--train.max-samples", "no effect", "--fast.train"],
    ),
    "an optimizer of the other training": (
        nothing,
        ["--windows", "2", "--train.optimizer.kind", "muon"],
        ["--train.optimizer.kind", "--fast.train"],
    ),
    "states of the other validation": (
        nothing,
        ["--windows", "2", "--validation.states", "4"],
        ["--validation.states", "--fast.validation-states"],
    ),
    "a term of the other loss": (nothing, ["--windows", "2", "--objective.guidance-weight", "1"], ["one term"]),
    "an assessor": (nothing, ["--windows", "2", "--david.fusion.formula", "static"], ["--david.fusion.formula"]),
    "a repository of the other run": (nothing, ["--windows", "2", "--hub.repo", "a/b"], ["--hub.repo", "--fast.hub"]),
    "settings of few steps without windows": (nothing, [], ["--fast.train.max-samples", "add --windows"]),
    "a grid at a scale that is not learnt": (
        nothing,
        ["--windows", "2", "--grid.sampler.guidance", "9"],
        ["grid.sampler.guidance 9", "3 to 8"],
    ),
    "a tracker that is not there": (
        nothing,
        ["--windows", "2", "--fast.train.tracking.to", "wandb"],
        ["fast.train.tracking.to: wandb"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_few_steps_cannot_do_is_refused_before_anything_is_written(
    name: str, own: Path, refused: Callable[..., str]
) -> None:
    broken, words, named = TABLE[name]
    broken(own)
    refused(command(own, *words), *named)


@pytest.mark.parametrize("value", ["'4 2 1'", "[true]", "[4, false]", "[2.5]", "{a: 4}", "[[4]]", "[1e1]", "null"])
def test_windows_of_a_file_that_are_no_list_of_numbers_are_refused_with_the_file(
    value: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"distill: {{windows: {value}}}\n")
    refused(["distill", *CONFIG, str(file), "--run", str(tmp_path / "run")], "own.yaml", "windows", "should be")


def test_one_number_of_windows_needs_no_list(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("distill: {windows: 4}\n")
    assert load(distill.Config, "distill", [Path(CONFIG[1]), file], ["--run", str(tmp_path)]).windows == (4,)
