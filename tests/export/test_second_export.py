"""A second export loses nothing that was added to the folder, and keeps nothing of its own that is out of date."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from configs.values import PictureSize
from stages.export import export_all, tensorfile
from stages.export.comfyui import is_unmodified_workflow, workflow_json
from stages.export.diffusers import export_diffusers
from stages.export.folder import is_unmodified_export, read_header
from stages.export.verify_export import ExportOptions, read_tensors
from stages.nets.student import Student
from stages.system.ownership import pid_namespace
from stages.system.refusal import Refused

FACTS = {"base_model": "someone/sd-embedded", "tail": "hold", "samples": 64}
ADDED = ("notes.txt", "unet/merge/recipe.yaml", ".gitattributes", "tokenizer/mine.txt")
HALF = Path("unet/diffusion_pytorch_model.fp16.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add(folder: Path) -> None:
    for name in ADDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"my own {name}")
    (folder / "vae" / "link").symlink_to("config.json")


@pytest.mark.parametrize("listed", [True, False], ids=["as exports are now", "as they were before they listed files"])
def test_added_files_are_kept_at_every_depth(
    listed: bool, folder: Path, student: Student, teacher_folder: Path
) -> None:
    if not listed:
        facts = json.loads((folder / "sollune.json").read_text())
        del facts["files"]
        (folder / "sollune.json").write_text(json.dumps(facts))
    add(folder)
    export_diffusers(student, teacher_folder, folder.parent, FACTS | {"samples": 128})
    assert [(folder / name).read_text() for name in ADDED] == [f"my own {name}" for name in ADDED]
    assert (folder / "vae" / "link").readlink() == Path("config.json")
    assert json.loads((folder / "sollune.json").read_text())["samples"] == 128
    export_diffusers(student, teacher_folder, folder.parent, FACTS)
    assert (folder / "notes.txt").exists()  # it did not become ours on the way


def test_our_own_files_of_an_earlier_kind_go(folder: Path, student: Student, teacher_folder: Path) -> None:
    export_diffusers(student, teacher_folder, folder.parent, FACTS, ExportOptions(dtype="both"))
    assert (folder / HALF).exists()
    export_diffusers(student, teacher_folder, folder.parent, FACTS)
    assert not (folder / HALF).exists()


@pytest.mark.parametrize(
    "name", ["README.md", "model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"]
)
def test_what_was_changed_is_refused_by_name(name: str, folder: Path, student: Student, teacher_folder: Path) -> None:
    changed = (folder / name).read_bytes()
    (folder / name).unlink()  # a file that is mapped into memory must not be written over
    (folder / name).write_bytes(changed + b" ")
    before = content(folder.parent)
    with pytest.raises(Refused, match=f"{name}: changed since the export wrote it - move it away"):
        export_diffusers(student, teacher_folder, folder.parent, FACTS)
    assert content(folder.parent) == before


def test_a_file_of_ours_that_became_a_link_is_refused(folder: Path, student: Student, teacher_folder: Path) -> None:
    (folder / "README.md").rename(folder.parent / "README.md")
    (folder / "README.md").symlink_to(folder.parent / "README.md")
    with pytest.raises(Refused, match=r"README\.md: changed since"):
        export_diffusers(student, teacher_folder, folder.parent, FACTS)


def test_a_single_file_from_before_there_were_seals_is_ours_and_a_changed_one_is_not(
    whole: Path, student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "export"))
    file = out / "sd-embedded-flow.safetensors"
    header, tensors = read_header(file), {name: value.clone() for name, value in read_tensors(file).items()}
    unsealed = {key: value for key, value in header.items() if key != tensorfile.HEADER_HASH_KEY}
    tensorfile.write(file, tensors, unsealed)
    export_all(student, teacher_folder, out, FACTS)
    tensorfile.write(file, tensors, header | {"modelspec.author": "me"})
    assert not is_unmodified_export(file)
    name = min(tensors)
    tensorfile.write(file, tensors | {name: tensors[name] + 1}, header)
    before = content(out)
    with pytest.raises(Refused, match=r"sd-embedded-flow\.safetensors: is not as an export of ours wrote it"):
        export_all(student, teacher_folder, out, FACTS)
    assert content(out) == before


def test_a_workflow_is_ours_until_it_is_changed() -> None:
    text = workflow_json("a-flow.safetensors", 1.0, PictureSize(64, 64))
    graph = json.loads(text)
    before_seals = json.dumps({**graph, "extra": {}}, indent=2) + "\n"
    saved_by_comfyui = json.dumps({**graph, "extra": {**graph["extra"], "ds": {"scale": 1}}}, indent=2) + "\n"
    assert is_unmodified_workflow(text)
    assert is_unmodified_workflow(before_seals)
    for changed in (text.replace("a lighthouse", "a house"), saved_by_comfyui, "{", "[]", ""):
        assert not is_unmodified_workflow(changed)


def test_a_stale_file_that_was_changed_is_left_alone(
    whole: Path, student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "export"))
    graph = out / "workflow-comfyui.json"
    graph.write_text(graph.read_text().replace("a lighthouse", "a house"))
    with torch.no_grad():
        student.unet.conv_in.bias += 1
    export_all(student, teacher_folder, out, FACTS, ExportOptions(single_file=False))
    assert sorted(path.name for path in out.iterdir()) == ["diffusers", "workflow-comfyui.json"]


def test_what_a_killed_export_left_is_cleared_away_and_what_it_moved_aside_comes_back(
    folder: Path, student: Student, teacher_folder: Path
) -> None:
    dead = f"{os.getpid()}-1@{pid_namespace()}"
    (folder / "notes.txt").write_text("mine")
    folder.rename(folder.with_name(f".diffusers.{dead}.earlier"))
    shutil.copytree(teacher_folder, folder.with_name(f".diffusers.{dead}.partial"))
    export_diffusers(student, teacher_folder, folder.parent, FACTS)
    assert [path.name for path in folder.parent.iterdir()] == ["diffusers"]
    assert (folder / "notes.txt").read_text() == "mine"
