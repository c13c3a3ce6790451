"""What students of few steps exclude, through the real commands: refused in one line, with nothing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages import __main__ as cli
from stages.nets.run_folder import Origin
from tests.few_steps import SAMPLES, TEACHER, load_teacher, make_fast_run

Refuses = Callable[..., str]
FACTS, UNET, SCHEDULER = Path("sollune.json"), Path("unet/config.json"), Path("scheduler/scheduler_config.json")
FILE = "model-4step-w5-flow.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an exported student of 4 steps in fast/4 and an ordinary one in distill."""
    home = tmp_path_factory.mktemp("home")
    fast, distill = home / "fast" / "4", home / "distill"
    student = make_fast_run(fast)
    assert cli.main(["export", str(fast)]) == 0
    plain = distill / "checkpoints" / f"{SAMPLES:09d}"
    plain.mkdir(parents=True)
    weights = student.state_dict()
    save_file({name: value for name, value in weights.items() if "cond_proj" not in name}, plain / "ema.safetensors")
    digests = load_teacher().files
    assert digests is not None
    Origin(str(TEACHER), dict(digests.digests), "hold", "ab" * 32, teacher_path=str(TEACHER.resolve())).save(distill)
    return home


def sampling(model: Path, *options: str) -> list[str]:
    return ["sample", str(model), "a red star", "--out", str(model.parent / "never.png"), *options]


SAMPLED = {
    "more steps": (["--steps", "8"], ["--steps 8", "samples in 4"]),
    "fewer steps": (["--steps", "2"], ["--steps 2", "samples in 4"]),
    "the steps of others": (["--steps", "25"], ["--steps 25", "samples in 4"]),
    "heun": (["--solver", "heun"], ["--solver heun", "use euler"]),
    "unipc": (["--solver", "unipc"], ["--solver unipc", "use euler"]),
    "ddim": (["--solver", "ddim"], ["--solver ddim", "use euler"]),
    "a shift": (["--shift", "2"], ["--shift 2", "shift 1"]),
    "too much guidance": (["--guidance", "9"], ["--guidance 9", "3 to 8"]),
    "too little guidance": (["--guidance", "1"], ["--guidance 1", "3 to 8"]),
    "no guidance": (["--guidance", "0"], ["--guidance 0", "3 to 8"]),
    "a negative sentence": (["--negative", "a circle"], ["--negative a circle", "do nothing"]),
}


@pytest.mark.parametrize("case", SAMPLED)
@pytest.mark.parametrize("model", ["", "export", "export/diffusers"])
def test_sampling_in_another_way_is_refused(refused: Refuses, home: Path, case: str, model: str) -> None:
    options, named = SAMPLED[case]
    refused(sampling(home / "fast" / "4" / model, *options), *named, below=home)


FOLDED = {**SAMPLED, "another scale": (["--guidance", "6"], ["--guidance 6", "5 alone"])}
FOLDED |= {
    name: (FOLDED[name][0], [FOLDED[name][1][0], "5 alone"])
    for name in ("too much guidance", "too little guidance", "no guidance")
}


@pytest.mark.parametrize("case", FOLDED)
def test_sampling_a_folded_file_in_another_way_is_refused(refused: Refuses, home: Path, case: str) -> None:
    options, named = FOLDED[case]
    refused(sampling(home / "fast" / "4" / "export" / FILE, *options), *named, below=home)


def edited(folder: Path, file: Path, **entries: Any) -> Path:
    """The folder with entries of a JSON file set, and those that are ... removed."""
    content = json.loads((folder / file).read_text())
    content.update(entries)
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return folder


BROKEN_FACTS = {
    "windows as text": ({"windows": "4"}, ["windows is 4", "not a number of steps"]),
    "no windows": ({"windows": 0}, ["windows is 0"]),
    "negative windows": ({"windows": -4}, ["windows is -4"]),
    "half a window": ({"windows": 4.5}, ["windows is 4.5"]),
    "a truth": ({"windows": True}, ["windows is True"]),
    "endless windows": ({"windows": 10**9}, ["windows is 1000000000"]),
    "a range without windows": ({"windows": ...}, ["windows is None"]),
    "windows without a range": ({"guidance_range": ...}, ["guidance_range is None"]),
    "one scale": ({"guidance_range": [5.0]}, ["guidance_range is [5.0]"]),
    "a falling range": ({"guidance_range": [8.0, 3.0]}, ["guidance_range is [8.0, 3.0]"]),
    "scales as text": ({"guidance_range": ["3", "8"]}, ["guidance_range"]),
    "a negative scale": ({"guidance_range": [-1.0, 8.0]}, ["guidance_range"]),
    "a range of text": ({"guidance_range": "3 to 8"}, ["guidance_range is 3 to 8"]),
}


@pytest.mark.parametrize("case", BROKEN_FACTS)
def test_an_export_whose_facts_are_no_windows_is_refused(
    refused: Refuses, home: Path, tmp_path: Path, case: str
) -> None:
    entries, named = BROKEN_FACTS[case]
    folder = Path(shutil.copytree(home / "fast" / "4" / "export" / "diffusers", tmp_path / "diffusers"))
    refused(sampling(edited(folder, FACTS, **entries)), str(FACTS), *named)


BROKEN_CONFIGS = {
    "no input for the scale": (UNET, {"time_cond_proj_dim": None}, ["4 windows", "takes no guidance scale"]),
    "an odd embedding": (UNET, {"time_cond_proj_dim": 255}, ["time_cond_proj_dim is 255"]),
    "an embedding of text": (UNET, {"time_cond_proj_dim": "256"}, ["time_cond_proj_dim is 256"]),
    "an embedding of a truth": (UNET, {"time_cond_proj_dim": True}, ["time_cond_proj_dim is True"]),
    "another embedding": (UNET, {"time_cond_proj_dim": 128}, ["cond_proj"]),
    "a shift": (SCHEDULER, {"flow_shift": 2.0}, ["4 windows", "shift 2"]),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_an_export_whose_configs_contradict_its_windows_is_refused(
    refused: Refuses, home: Path, tmp_path: Path, case: str
) -> None:
    file, entries, named = BROKEN_CONFIGS[case]
    folder = Path(shutil.copytree(home / "fast" / "4" / "export" / "diffusers", tmp_path / "diffusers"))
    refused(sampling(edited(folder, file, **entries)), *named)


def test_an_input_for_the_scale_without_windows_is_refused(refused: Refuses, home: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(home / "fast" / "4" / "export" / "diffusers", tmp_path / "diffusers"))
    refused(sampling(edited(folder, FACTS, windows=..., guidance_range=...)), "time_cond_proj_dim is 256")


BROKEN_METADATA = {
    "windows that are no number": ({"windows": "four"}, ["windows is four"]),
    "no windows": ({"windows": None}, ["windows is None"]),
    "no scale": ({"guidance": None}, ["sollune.guidance is None"]),
    "a scale that is no number": ({"guidance": "strong"}, ["sollune.guidance is strong"]),
    "an infinite scale": ({"guidance": "Infinity"}, ["sollune.guidance is inf"]),
    "two scales": ({"guidance": "[3, 8]"}, ["sollune.guidance is [3, 8]"]),
    "a shift": ({"shift": "2"}, ["4 windows", "shift 2"]),
}


@pytest.mark.parametrize("case", BROKEN_METADATA)
def test_a_folded_file_whose_metadata_are_no_windows_is_refused(
    refused: Refuses, home: Path, tmp_path: Path, case: str
) -> None:
    changes, named = BROKEN_METADATA[case]
    export = home / "fast" / "4" / "export"
    with safe_open(export / FILE, "pt") as opened:
        metadata = opened.metadata()
    metadata |= {f"sollune.{key}": value for key, value in changes.items() if value is not None}
    for key, value in changes.items():
        if value is None:
            del metadata[f"sollune.{key}"]
    save_file(load_file(export / FILE), tmp_path / FILE, metadata)
    refused(sampling(tmp_path / FILE, "--config-from", str(TEACHER)), FILE, *named)


EXPORTED = {
    "a scale beyond": ("fast/4", ["--fold", "9"], ["--fold 9", "3 to 8"]),
    "one of several beyond": ("fast/4", ["--fold", "5", "2.5"], ["--fold 2.5", "3 to 8"]),
    "a scale that is no number": ("fast/4", ["--fold", "nan"], ["fold", "nan"]),
    "a scale twice": ("fast/4", ["--fold", "5", "5.0"], ["--fold 5", "more than once"]),
    "no scale": ("fast/4", ["--fold", "five"], ["fold", "five"]),
    "a shift": ("fast/4", ["--flow-shift", "2"], ["--flow-shift 2", "4 windows"]),
    "a fold without files": ("fast/4", ["--fold", "5", "--single-file", "false"], ["--fold", "--single-file false"]),
    "the original's layout": ("fast/4", ["--to", "pt"], ["--to pt", "guidance scale"]),
    "a fold in the original's layout": ("fast/4", ["--to", "pt", "--fold", "5"], ["fold does not apply"]),
    "a fold of two branches": ("distill", ["--fold", "5"], ["--fold 5", "takes no guidance scale"]),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_an_export_that_cannot_be_is_refused(refused: Refuses, home: Path, case: str) -> None:
    run, options, named = EXPORTED[case]
    refused(["export", str(home / run), "--out", str(home / "never"), *options], *named, below=home)


def test_verification_notices_facts_of_other_windows(refused: Refuses, home: Path, tmp_path: Path) -> None:
    export = Path(shutil.copytree(home / "fast" / "4" / "export", tmp_path / "export"))
    edited(export / "diffusers", FACTS, windows=2)
    words = ["export", str(home / "fast" / "4"), "--out", str(export), "--verify"]
    refused(words, "states 2 windows", "4 windows")


OTHER_COMMANDS = {
    "LoRAs": (["evaluate", "{fast}", "--config", "configs/tiny.yaml", "--lora", "x.safetensors"], "LoRAs"),
    "David": (["david", "show", "{fast}"], "David"),
    "a conversion": (
        ["convert", "stages/tiny/model", "--base", "{fast}", "--out", "{home}/never", "--config", "configs/tiny.yaml"],
        "a conversion",
    ),
    "a suggestion": (
        ["classes", "suggest", "{fast}", "--config", "configs/tiny.yaml", "--out", "{home}/never.yaml"],
        "a suggestion of classes",
    ),
    "classes": (
        ["finetune-classes", "--config", "configs/tiny.yaml", "--run", "{swapped}"],
        "the training of classes",
    ),
}


@pytest.mark.parametrize("case", OTHER_COMMANDS)
def test_what_needs_both_branches_is_refused(refused: Refuses, home: Path, tmp_path: Path, case: str) -> None:
    words, named = OTHER_COMMANDS[case]
    shutil.copytree(home / "fast" / "4", tmp_path / "distill")
    shutil.copytree("tests/golden/data/cache", tmp_path / "cache")
    places = {"fast": home / "fast" / "4", "home": home, "swapped": tmp_path}
    refused([word.format(**places) for word in words], "4 steps", named, "both branches", below=home)


TEACHERS = {"the folder": ("export/diffusers", []), "a folded file": (f"export/{FILE}", ["--teacher.config"])}


@pytest.mark.parametrize("case", TEACHERS)
def test_it_is_no_teacher(refused: Refuses, home: Path, case: str) -> None:
    place, option = TEACHERS[case]
    options = [*option, *([str(TEACHER)] if option else [])]
    teacher = ["--teacher", str(home / "fast" / "4" / place), *options]
    refused(["cache-teacher", "--config", "configs/tiny.yaml", "--run", str(home / "never"), *teacher], below=home)


EVALUATED = {
    "a scale beyond": (["--paired.sampler.guidance", "9"], ["sampler.guidance 9", "3 to 8"]),
    "another solver": (["--paired.sampler.solver", "heun"], ["sampler.solver heun", "use euler"]),
    "a shift": (["--paired.sampler.shift", "2"], ["sampler.shift 2"]),
    "pictures of a scale beyond": (["--fidelity.guidance", "1"], ["fidelity.guidance 1", "3 to 8"]),
}


@pytest.mark.parametrize("case", EVALUATED)
def test_an_evaluation_in_another_way_is_refused(refused: Refuses, home: Path, case: str) -> None:
    options, named = EVALUATED[case]
    few = ["--paired.prompts", "2", "--fidelity.prompts", "2", "--fidelity.control-prompts", "1"]
    words = ["evaluate", str(home / "fast" / "4"), "--config", "configs/tiny.yaml", *few, *options]
    refused(words, *named, below=home)


BROKEN_ORIGINS = {
    "windows of nothing": {"windows": 0},
    "windows as text": {"windows": "four"},
    "windows without a range": {"guidance_range": None},
    "a range without windows": {"windows": None},
    "one scale": {"guidance_range": [5.0]},
}


@pytest.mark.parametrize("case", BROKEN_ORIGINS)
def test_an_origin_that_cannot_be_is_refused(refused: Refuses, home: Path, tmp_path: Path, case: str) -> None:
    run = Path(shutil.copytree(home / "fast" / "4", tmp_path / "4"))
    refused(sampling(edited(run, Path("origin.json"), **BROKEN_ORIGINS[case])), "origin.json")
