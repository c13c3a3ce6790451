"""What `sollune evaluate` cannot measure distances of, through the real command: refused in one line."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stages import __main__ as cli
from stages.nets.run_folder import Origin
from tests.few_steps import load_teacher

Refuses = Callable[..., str]
TEACHER = Path("stages/tiny/model")
SMALL = ["--velocity-states", "0", "--paired.prompts", "2", "--fidelity.prompts", "2", "--prompts.source", "grammar"]
SMALL += ["--prompts.grammar", "stages/tiny/grammar.yaml"]
FEATURES = ["--features", "stages.tiny.score.features"]


def wide(pictures: torch.Tensor) -> torch.Tensor:
    return pictures


def whole_numbers(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.flatten(1).long()


def endless(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.flatten(1) / 0


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded teacher's own weights, a folder of pictures, and a COCO of two photographs."""
    home = tmp_path_factory.mktemp("home")
    checkpoint = home / "distill" / "checkpoints" / "000000064"
    checkpoint.mkdir(parents=True)
    teacher = load_teacher()
    save_file(
        {f"unet.{name}": value for name, value in teacher.unet.state_dict().items()}, checkpoint / "ema.safetensors"
    )
    assert teacher.files is not None
    digests = dict(teacher.files.digests)
    Origin(str(TEACHER), digests, "hold", "ab" * 32, teacher_path=str(TEACHER.resolve())).save(home / "distill")
    for folder, names in (("pictures", ["a red star.png", "a ring.png"]), ("photographs", ["1.png", "2.png"])):
        (home / folder).mkdir()
        for name in names:
            Image.new("RGB", (70, 64), "red").save(home / folder / name)
    images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)]
    captions = [{"id": i, "image_id": i, "caption": f"a star {i}"} for i in (1, 2)]
    (home / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return home


@pytest.fixture
def home(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "home"))


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda home: (home / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def nothing(home: Path) -> None:
    """The home as it is."""


PICTURES, COCO = (
    "pictures/prompts.json",
    ["--coco.captions", "{home}/captions.json", "--coco.images", "{home}/photographs"],
)
OF_FOLDER = ["--pictures", "{home}/pictures"]
HERE = "tests.cli.test_broken_measures"
CASES: dict[str, tuple[Callable[[Path], Any], Sequence[str], Sequence[str]]] = {
    "features of no module": (
        nothing,
        ["--features", "no.such.module"],
        ["features: no.such.module", "MODULE.FUNCTION"],
    ),
    "features of no place": (nothing, ["--features", "inception.pt"], ["features: inception.pt"]),
    "features that are a class": (nothing, ["--features", "pathlib.Path"], ["features: pathlib.Path", "no function"]),
    "features that are no rows": (nothing, ["--features", f"{HERE}.wide"], ["[2, 3, 64, 64]", "[b d]"]),
    "features that are counts": (nothing, ["--features", f"{HERE}.whole_numbers"], ["no finite numbers"]),
    "features that are not finite": (nothing, ["--features", f"{HERE}.endless"], ["no finite numbers"]),
    "features that are a text file": (nothing, ["--features", "{home}/captions.json"], ["no TorchScript file"]),
    "features that are no CLIP": (nothing, ["--features", "{home}/pictures"], ["no CLIP model"]),
    "a CLIP that is none": (nothing, ["--clip", "{home}/pictures"], ["clip:", "no CLIP model"]),
    "pictures without a measure": (nothing, OF_FOLDER, ["pictures: nothing is measured of them", "features"]),
    "pictures of other prompts": (nothing, [*OF_FOLDER, *FEATURES], ["pictures: pictures: 0 of its 2", "the first:"]),
    "pictures that are not there": (nothing, ["--pictures", "{home}/none", *FEATURES], ["none", "no folder"]),
    "pictures without a picture": (nothing, ["--pictures", "{home}/distill", *FEATURES], ["distill", "no png"]),
    "pictures of a column's name": (
        lambda home: (home / "pictures").rename(home / "student"),
        ["--pictures", "{home}/student", *FEATURES],
        ["'student'", "rename"],
    ),
    "a picture that is cut": (write("pictures/a ring.png", b"\x89PNG"), [*OF_FOLDER, *FEATURES], ["a ring.png"]),
    "a picture named by a number": (
        lambda home: (home / "pictures/a ring.png").rename(home / "pictures/0001.png"),
        [*OF_FOLDER, *FEATURES],
        ["0001.png", "no sentence"],
    ),
    "a list that is cut": (write(PICTURES, '{"a'), [*OF_FOLDER, *FEATURES], ["prompts.json", "not JSON"]),
    "a list that is a number": (write(PICTURES, "3"), [*OF_FOLDER, *FEATURES], ["prompts.json", "no list"]),
    "a list of too few": (write(PICTURES, '{"a ring.png": "x"}'), [*OF_FOLDER, *FEATURES], ["a red star.png"]),
    "a list of too many": (write(PICTURES, '{"b.png": "x"}'), [*OF_FOLDER, *FEATURES], ["b.png", "no such picture"]),
    "a list with an empty prompt": (write(PICTURES, '{"a ring.png": " "}'), [*OF_FOLDER, *FEATURES], ["a ring.png"]),
    "a table without its columns": (write("pictures/prompts.csv", "a,b\nx,y\n"), [*OF_FOLDER, *FEATURES], ["columns"]),
    "two lists": (
        lambda home: [write(f"pictures/{name}", "{}")(home) for name in ("prompts.json", "prompts.csv")],
        [*OF_FOLDER, *FEATURES],
        ["prompts.csv and prompts.json", "remove one"],
    ),
    "a COCO without a measure": (nothing, COCO, ["coco:", "features or clip"]),
    "a COCO of too few": (nothing, [*COCO, *FEATURES], ["coco.count: 5000", "has 2"]),
    "a COCO that is cut": (write("captions.json", "{"), [*COCO, *FEATURES], ["coco.captions", "captions.json"]),
    "a COCO of other things": (write("captions.json", "[]"), [*COCO, *FEATURES], ["coco.captions"]),
    "a COCO that is not there": (lambda home: (home / "captions.json").unlink(), [*COCO, *FEATURES], ["captions.json"]),
    "a COCO with LoRAs": (nothing, [*COCO, *FEATURES, "--lora", "a.safetensors"], ["coco", "lora"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(refused: Refuses, home: Path, case: str) -> None:
    change, options, named = CASES[case]
    change(home)
    words = [word.format(home=home) for word in options]
    refused(["evaluate", str(home / "distill"), *SMALL, *words], *named)


def test_a_missing_extra_is_refused_with_the_command_that_installs_it(
    refused: Refuses, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchmetrics" else find(name, *rest)
    )
    refused(["evaluate", str(home / "distill"), *SMALL, *FEATURES], "torchmetrics", "pip install 'sollune[metrics]'")


def test_a_photograph_that_is_missing_is_refused_by_name(refused: Refuses, home: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(1, 5)]
    captions = [{"id": i, "image_id": i, "caption": f"a star {i}"} for i in range(1, 5)]
    (home / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    words = [word.format(home=home) for word in COCO]
    refused(["evaluate", str(home / "distill"), *SMALL, *FEATURES, *words, "--coco.count", "4"], "coco.images", ".png")


def test_the_option_is_shown_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert "--coco.captions" in shown
    assert "--pictures" in shown
