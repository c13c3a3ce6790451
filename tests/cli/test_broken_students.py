"""Settings of pruned students and of students from scratch that contradict: refused in one line, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages import __main__ as cli
from tests.fast.runs import CONFIG, FEW_PROMPTS, GRID

FEW = ("--david.fusion.formula", "static", "--train.max-samples", "4", "--train.batch-size", "4", *GRID)
FEW += ("--validation.states", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a cache and a pruned student."""
    run = tmp_path_factory.mktemp("made") / "run"
    assert cli.main(["cache-teacher", *CONFIG, "--run", str(run), *FEW_PROMPTS]) == 0
    assert cli.main(["distill", *CONFIG, "--run", str(run), *FEW, "--student.prune", "tiny"]) == 0
    return run


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


DISTILL = {
    "an unknown pruning": (["--student.prune", "half"], ["student.prune = half", "should be"]),
    "no pruning but a number": (["--student.prune", "1"], ["student.prune = 1"]),
    "an unknown setting": (["--student.shape", "tiny"], ["--student.shape"]),
    "scratch that is no truth": (["--student.scratch", "maybe"], ["student.scratch = maybe"]),
    "a graft of random weights": (["--student.scratch", "true", "--graft", "true"], ["graft true", "student.scratch"]),
    "a graft of v-prediction": (["--target", "vp_v", "--graft", "true"], ["graft is for target velocity"]),
    "another form of the block term": (["--objective.block-form", "norm"], ["objective.block_form = norm", "should"]),
    "another target": (["--objective.velocity-target", "x0"], ["objective.velocity_target = x0", "should"]),
    "a block that no UNet has": (
        ["--objective.block-weights", "middle=1"],
        ["block_weights.middle", "did you mean mid?"],
    ),
    "a whole student in its folder": ([], ["belongs to another run", "student", "choose another run folder"]),
    "less pruning in its folder": (["--student.prune", "small"], ["student.prune was tiny, is small"]),
    "random weights in its folder": (["--student.prune", "tiny", "--student.scratch", "true"], ["student.scratch was"]),
    "another target in its folder": (
        ["--student.prune", "tiny", "--objective.velocity-target", "data"],
        ["objective.velocity_target was", "is data"],
    ),
    "pruning for few steps": (["--windows", "2", "--student.prune", "tiny"], ["--student.prune", "no effect"]),
    "scratch for few steps": (["--windows", "2", "--student.scratch", "true"], ["--student.scratch", "no effect"]),
}


@pytest.mark.parametrize("name", DISTILL)
def test_distill_refuses(name: str, own: Path, refused: Callable[..., str]) -> None:
    options, named = DISTILL[name]
    refused(["distill", *CONFIG, "--run", str(own), *FEW, *options], *named)


ORIGINS = {
    "an unknown pruning": ({"prune": "half"}, ["origin.json", "cannot be read"]),
    "a pruning that is a number": ({"prune": 1}, ["origin.json", "cannot be read"]),
    "another pruning than the weights'": ({"prune": "small"}, ["not the student's weights"]),
    "no pruning": ({"prune": "none"}, ["not the student's weights"]),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_an_origin_that_tells_another_shape_is_refused(name: str, own: Path, refused: Callable[..., str]) -> None:
    changes, named = ORIGINS[name]
    file = own / "distill/origin.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(["export", str(own / "distill")], *named)


WHOLE = "all layers of its teacher"
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "the original's checkpoint": (["export", "RUN/distill", "--to", "pt"], ["pruned (tiny)", WHOLE]),
    "a single file": (["export", "RUN/distill", "--single-file", "true"], ["pruned", "--single-file"]),
    "a file of the UNet": (["export", "RUN/distill", "--unet-only", "true"], ["pruned", "--unet-only"]),
    "a conversion": (
        ["convert", *CONFIG, "--base", "RUN", "--teacher", "stages/tiny/model", "--out", "RUN/converted"],
        ["pruned (tiny)", WHOLE],
    ),
    "its export as a teacher": (
        ["cache-teacher", *CONFIG, "--run", "RUN/other", "--teacher", "RUN/distill/export/diffusers"],
        ["RUN/distill/export/diffusers"],
    ),
    "pictures as targets of classes": (
        ["finetune-classes", *CONFIG, "--run", "RUN", "--objective.velocity-target", "data"],
        ["objective.velocity_target data", "pictures.painted"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_pruned_students_where_layers_are_missing(
    name: str, own: Path, refused: Callable[..., str]
) -> None:
    words, named = COMMANDS[name]
    refused([word.replace("RUN", str(own)) for word in words], *(part.replace("RUN", str(own)) for part in named))
