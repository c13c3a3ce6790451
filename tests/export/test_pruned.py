"""Exports of pruned students: stock diffusers reads them, and a single file where the LDM layout can hold it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from stages.export import export_all
from stages.export.checks import check_trained
from stages.export.existing import verify_export
from stages.flow.schedule import NoiseSchedule
from stages.nets.components import load_components
from stages.nets.features import with_settings
from stages.nets.student import Student, make_vp_bridge
from stages.nets.student_shape import Prune, StudentConfig, prune_unet
from stages.sampling.models import load_model
from stages.system.refusal import Refused
from stages.teacher_files.folder import read_json
from tests.export.conftest import FACTS


def trained(teacher: Path, prune: Prune, target: Any = "velocity") -> Student:
    """A pruned student with noise on every tensor."""
    schedule = NoiseSchedule.from_config(read_json(teacher / "scheduler" / "scheduler_config.json"))
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    student = StudentConfig(prune=prune).make(unet, make_vp_bridge(target, schedule, "hold"), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.unet.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return student.eval().requires_grad_(False)


def pruned_facts(prune: Prune, fits_ldm: bool) -> dict[str, Any]:
    return {**FACTS, "prune": prune, "fits_ldm": fits_ldm}


@pytest.fixture(scope="module")
def two_layers(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with two layers a block, as SD1.5 has, whose config says nothing of the middle block."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path_factory.mktemp("two") / "teacher"))
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(with_settings(config, layers_per_block=2)).save_pretrained(folder / "unet")
    written = read_json(folder / "unet" / "config.json")
    del written["mid_block_type"]
    (folder / "unet" / "config.json").write_text(json.dumps(written))
    return folder


def test_of_two_layers_a_block_the_small_student_has_a_single_file(two_layers: Path, tmp_path: Path) -> None:
    student = trained(two_layers, "small")
    folder, single = export_all(student, two_layers, tmp_path, pruned_facts("small", True))
    unet = StableDiffusionPipeline.from_single_file(single, config=str(folder), local_files_only=True).unet
    assert all(
        torch.equal(value, student.unet.state_dict()[key].half()) for key, value in unet.half().state_dict().items()
    )
    assert read_json(folder / "unet" / "config.json")["layers_per_block"] == 1
    card = (folder / "README.md").read_text()
    assert "pruned (`small`" in card
    assert "no single file" not in card
    assert verify_export(tmp_path, student, two_layers) == (folder, single)


@pytest.mark.parametrize("layers", [1, 2])
def test_without_a_middle_block_there_is_no_single_file_and_command_and_card_say_so(
    layers: int, teacher_folder: Path, two_layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = two_layers if layers == 2 else teacher_folder
    student = trained(teacher, "tiny")
    assert export_all(student, teacher, tmp_path, pruned_facts("tiny", False)) == (tmp_path / "diffusers",)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no single file: ")]
    assert len(lines) == 1
    assert not list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob("*.json"))
    card = (tmp_path / "diffusers" / "README.md").read_text()
    assert "There is no single file" in card
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "diffusers")
    assert pipeline.unet.mid_block is None
    loaded = load_model(str(tmp_path), "cpu")
    x, cond = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), loaded.encode(["a red star"])
    s = torch.tensor([0.5])
    with torch.no_grad():
        velocities = [one.velocity(x, s, cond) for one in (Student(pipeline.unet.float()), student)]
    torch.testing.assert_close(*velocities, atol=1e-2, rtol=1e-2)


def test_a_pruned_student_of_v_prediction_is_read_back_from_its_export(teacher_folder: Path, tmp_path: Path) -> None:
    student = trained(teacher_folder, "tiny", "vp_v")
    (folder,) = export_all(student, teacher_folder, tmp_path, pruned_facts("tiny", False))
    assert "no single file" not in (folder / "README.md").read_text().replace("There is no single file", "")
    assert load_model(str(folder), "cpu").field is not None
    with pytest.raises(Refused, match=r"only SD-1\.x models"):
        load_components(str(folder), torch.device("cpu"), torch.float32)


def test_a_tensor_that_did_not_train_is_found_at_its_new_place(teacher_folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet")
    student, start = trained(teacher_folder, "small").unet.state_dict(), prune_unet(unet, "small").state_dict()
    check_trained(student, start)
    moved = "up_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(start[moved], unet.state_dict()["up_blocks.0.resnets.1.conv1.weight"])
    with pytest.raises(Refused, match=moved):
        check_trained({**student, moved: start[moved]}, start)


def test_query_and_key_of_a_self_attention_may_stay_where_its_values_moved(teacher_folder: Path) -> None:
    student = trained(teacher_folder, "small").unet.state_dict()
    start = prune_unet(UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet"), "small").state_dict()
    layer = "up_blocks.1.attentions.0.transformer_blocks.0"
    of_one_position = {f"{layer}.attn1.to_{part}.weight" for part in "qk"}
    check_trained({**student, **{name: start[name] for name in of_one_position}}, start)
    values, query = f"{layer}.attn1.to_v.weight", f"{layer}.attn2.to_q.weight"
    for name in (values, query):  # nor may the query of an attention to the text, which has many positions
        with pytest.raises(Refused, match=rf"1 of \d+ tensors are still the teacher's \({name} "):
            check_trained({**student, name: start[name]}, start)
    with pytest.raises(Refused, match="3 of "):
        check_trained({**student, **{name: start[name] for name in (*of_one_position, values)}}, start)


def test_an_export_under_another_teachers_name_is_refused(
    two_layers: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="name its own teacher"):
        export_all(trained(two_layers, "tiny"), teacher_folder, tmp_path, pruned_facts("tiny", False))
    assert not (tmp_path / "diffusers").exists()
