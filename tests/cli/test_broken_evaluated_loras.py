"""`evaluate --lora` with what cannot be measured, through the real command: refused in one line, nothing written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.export.diffusers import export_diffusers
from stages.export.verify_export import ExportOptions
from stages.nets.components import load_components
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import Origin
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.teacher_files.folder import component_digests
from tests import lora_files as made
from tests.cli.conftest import TEACHER

Prepare = Callable[[Path], list[str]]
"""Changes a folder with `run` and `style.safetensors`; returns the words behind the run."""


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the embedded teacher, exported, its prompts, and a LoRA that fits."""
    folder = tmp_path_factory.mktemp("measured")
    parts = load_components(str(TEACHER), torch.device("cpu"), torch.float32)
    student = Student.from_teacher(parts.unet)
    graft_time_embedding(student.unet, Teacher(parts, "hold").bridge)
    with torch.no_grad():
        for parameter in student.unet.parameters():
            parameter += 1e-3
    checkpoint = folder / "run" / "checkpoints" / "000000064"
    checkpoint.mkdir(parents=True)
    save_file(student.state_dict(), checkpoint / "ema.safetensors")
    origin = Origin(str(TEACHER), component_digests(TEACHER), "hold", "0" * 64, teacher_path=str(TEACHER.absolute()))
    origin.save(folder / "run")
    facts = {"samples": 64, "teacher": "model"}
    export_diffusers(student.eval(), TEACHER, folder / "run" / "export", facts, ExportOptions(dtype="float32"))
    (folder / "prompts.txt").write_text("\n".join(f"a {n} star" for n in "abcdefghijklmnopqrstuvwxyz"))
    made.write(made.kohya(made.random_pairs("to_v")), folder / "style.safetensors")
    return folder


def words(*values: str) -> Prepare:
    return lambda folder: ["--lora", *(value.replace("DIR", str(folder)) for value in values)]


def file(tensors: made.Tensors, **metadata: str) -> Prepare:
    """Another LoRA in its place."""

    def prepare(folder: Path) -> list[str]:
        metadata_of = {key.replace("_", ".", 1): value for key, value in metadata.items()}
        return ["--lora", str(made.write(tensors, folder / "style.safetensors", metadata_of))]

    return prepare


def removed(name: str) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return ["--lora", str(folder / "style.safetensors")]

    return prepare


def stale_export(folder: Path) -> list[str]:
    weights = folder / "run/checkpoints/000000064/ema.safetensors"
    newer = folder / "run/checkpoints/000000128"
    newer.mkdir()
    save_file({name: value + 1 for name, value in load_file(weights).items()}, newer / "ema.safetensors")
    return ["--lora", str(folder / "style.safetensors")]


def blocked_report(folder: Path) -> list[str]:
    (folder / "run" / "loras").write_text("a file")
    return ["--lora", str(folder / "style.safetensors")]


def same_name(folder: Path) -> list[str]:
    (folder / "other").mkdir()
    shutil.copyfile(folder / "style.safetensors", folder / "other" / "style.pt")
    return ["--lora", str(folder / "style.safetensors"), "--lora", f"{folder / 'other' / 'style.pt'}:2"]


def wide(name: str) -> made.Tensors:
    return {f"{name}.lora_down.weight": torch.ones(4, 2048), f"{name}.lora_up.weight": torch.ones(64, 4)}


SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
PLAIN = made.kohya(made.random_pairs("to_v"), alpha=None)
ADAPTERS = made.peft(made.random_pairs("to_q"))
STYLE = "DIR/style.safetensors"

TABLE: dict[str, tuple[Prepare, list[str]]] = {
    "an empty name": (words(""), ["lora", "should name"]),
    "no such file": (words("DIR/none.safetensors"), ["lora: ", "none.safetensors", "does not exist"]),
    "no such file with a scale": (words("DIR/none.safetensors:.5"), ["none.safetensors does not exist"]),
    "a comma in the scale": (words(f"{STYLE}:0,5"), ["style.safetensors:0,5", "does not exist"]),
    "the second of two is missing": (words(STYLE, "DIR/none.safetensors"), ["none.safetensors", "does not exist"]),
    "a folder": (words("DIR/run"), ["lora: ", "a folder"]),
    "text": (words("DIR/prompts.txt"), ["lora: ", "prompts.txt"]),
    "a whole model": (words("DIR/run/checkpoints/000000064/ema.safetensors"), ["holds no low-rank pair"]),
    "scale zero": (words(f"{STYLE}:0"), ["evaluate.lora", "scale 0"]),
    "scale minus zero": (words(f"{STYLE}:-0.0"), ["evaluate.lora", "scale 0"]),
    "scale that is no number": (words(f"{STYLE}:nan"), ["scale", "nan", "finite"]),
    "an endless scale": (words(f"{STYLE}:-inf"), ["scale", "-inf", "finite"]),
    "a scale beyond all numbers": (words(f"{STYLE}:1e999"), ["scale", "1e999", "finite"]),
    "a scale beyond what weights hold": (words(f"{STYLE}:1e38"), ["style.safetensors", "beyond all numbers"]),
    "the second scale is zero": (words(STYLE, f"{STYLE}:0"), ["evaluate.lora.1", "scale 0"]),
    "two of one name": (same_name, ["style", "two measurements of that name"]),
    "one twice": (words(STYLE, f"{STYLE}:.5"), ["style", "two measurements of that name"]),
    "another anatomy": (file(wide(SDXL)), ["style.safetensors", "shape", "SDXL"]),
    "another width": (
        file({key: value[:, :16] if "lora_down" in key else value for key, value in PLAIN.items()}),
        ["style.safetensors", "shape"],
    ),
    "layers of another model": (file(wide("lora_unet_double_blocks_0_img_attn_proj")), ["a diffusion transformer"]),
    "a flow model's adapters": (file(ADAPTERS, sollune_prediction="velocity"), ["adapters of a flow model"]),
    "adapters of a student of v-prediction": (
        file(ADAPTERS, sollune_prediction="vp_v"),
        ["adapters of a student that predicts vp_v"],
    ),
    "values that are not finite": (
        file({key: value / 0 if "lora_up" in key else value for key, value in PLAIN.items()}),
        ["style.safetensors", "not finite"],
    ),
    "no export yet": (removed("run/export"), ["export/diffusers", "sollune export"]),
    "an export of another checkpoint": (stale_export, ["is not the export", "sollune export"]),
    "no checkpoint": (removed("run/checkpoints"), ["no checkpoint"]),
    "no run": (removed("run/origin.json"), ["no run lies here"]),
    "a file where the reports belong": (blocked_report, ["loras", "cannot be written"]),
    "a size that the model has not": (
        lambda folder: [*words(STYLE)(folder), "--paired.sizes", "65x64"],
        ["paired.sizes", "65x64"],
    ),
    "too few prompts": (lambda folder: [*words(STYLE)(folder), "--lora-prompts", "7"], ["lora_prompts", "8"]),
}


@pytest.fixture
def folder(measured_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured_run, tmp_path / "own", symlinks=True))


@pytest.mark.parametrize("name", TABLE)
def test_what_cannot_be_measured_is_refused(name: str, folder: Path, refused: Callable[..., str]) -> None:
    prepare, named = TABLE[name]
    refused(["evaluate", str(folder / "run"), *prompts(folder), *prepare(folder)], *named)


def test_without_a_source_of_prompts_the_remedy_names_the_option(folder: Path, refused: Callable[..., str]) -> None:
    lora = ["--lora", str(folder / "style.safetensors")]
    refused(["evaluate", str(folder / "run"), *lora], "cache.yaml", "--prompts.source")


@pytest.mark.parametrize("text", ["", "[]", "cache_teacher: {}", "cache_teacher: {prompts: {source: nowhere}}"])
def test_a_broken_record_of_prompts_is_refused(text: str, folder: Path, refused: Callable[..., str]) -> None:
    (folder / "cache.yaml").write_text(text)
    refused(["evaluate", str(folder / "run"), "--lora", str(folder / "style.safetensors")], "cache.yaml", "prompts")


def prompts(folder: Path) -> list[str]:
    return ["--prompts.source", "file", "--prompts.path", str(folder / "prompts.txt")]
