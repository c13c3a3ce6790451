"""Each thing that can be wrong with an export is caught by its own check, on the disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.export import checks, export_all, main, tensorfile
from stages.export.diffusers import export_diffusers
from stages.export.ldm import open_export, verify_single_file
from stages.export.verify_export import ExportContent, ExportOptions, verify_folder
from stages.nets.run_folder import Origin
from stages.nets.student import Student
from stages.system.refusal import Refused
from stages.teacher_files.folder import component_digests

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
SCHEDULER = Path("scheduler") / "scheduler_config.json"
FACTS = {"base_model": "someone/sd-embedded", "samples": 64, "tail": "hold"}
Damage = Callable[[dict[str, torch.Tensor]], object]


def content_of(student: Student, teacher_folder: Path) -> ExportContent:
    return ExportContent(student, teacher_folder, ExportOptions(flow_shift=2.5))


def change(file: Path, damage: Damage) -> None:
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def test_the_teachers_weights_under_the_students_name_are_caught(
    folder: Path, student: Student, teacher_folder: Path
) -> None:
    teacher = {name: value.half() for name, value in load_file(teacher_folder / UNET).items()}
    save_file(teacher, folder / UNET, metadata={"format": "pt"})
    with pytest.raises(Refused, match="the teacher's weights under the student's name"):
        verify_folder(folder, content_of(student, teacher_folder))


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        (UNET, lambda t: t.pop("conv_in.bias"), r"1 tensors are missing \(conv_in\.bias"),
        (UNET, lambda t: t.update({"v_pred": torch.zeros(1).half()}), r"1 tensors are unexpected \(v_pred"),
        (UNET, lambda t: t.update({"conv_in.bias": torch.zeros(3).half()}), r"conv_in\.bias has the shape \[3\]"),
        (
            UNET,
            lambda t: swap(t, "conv_norm_out.weight", "conv_norm_out.bias"),
            r"conv_norm_out\.(bias|weight) did not come back as written \(it is conv_norm_out\.(bias|weight)\)",
        ),
        (UNET, lambda t: t.update({"conv_in.bias": t["conv_in.bias"].float()}), r"conv_in\.bias is torch\.float32"),
        (UNET, lambda t: t["conv_in.bias"].fill_(torch.nan), r"conv_in\.bias holds values that are no numbers"),
        (UNET, lambda t: t["conv_in.bias"].fill_(torch.inf), r"conv_in\.bias holds values that are no numbers"),
        (Path("vae") / UNET.name, lambda t: t["quant_conv.bias"].add_(1), r"vae.*quant_conv\.bias did not come back"),
        (
            Path("text_encoder/model.safetensors"),
            lambda t: t.update({"final_layer_norm.bias": t.pop("text_model.final_layer_norm.bias")}),
            r"text_encoder.*missing \(text_model\.final_layer_norm\.bias",
        ),
    ],
)
def test_a_damaged_tensor_is_caught_by_name(
    part: Path, damage: Damage, message: str, folder: Path, student: Student, teacher_folder: Path
) -> None:
    change(folder / part, damage)
    with pytest.raises(Refused, match=message):
        verify_folder(folder, content_of(student, teacher_folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is epsilon, the student predicts flow_prediction"),
        ({"prediction_type": None}, "prediction_type is None"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas is False, not True"),
        ({"flow_shift": 3.0}, r"flow_shift is 3\.0, not 2\.5"),
        ({"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler'"),
    ],
)
def test_another_scheduler_is_caught(
    changes: dict[str, object], message: str, folder: Path, student: Student, teacher_folder: Path
) -> None:
    config = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps({**config, **changes}))
    with pytest.raises(Refused, match=message):
        verify_folder(folder, content_of(student, teacher_folder))


def test_the_teachers_own_scheduler_is_caught(folder: Path, student: Student, teacher_folder: Path) -> None:
    shutil.copy(teacher_folder / SCHEDULER, folder / SCHEDULER)
    with pytest.raises(Refused, match="prediction_type is epsilon"):
        verify_folder(folder, content_of(student, teacher_folder))


def test_right_tensors_in_a_network_that_computes_otherwise_are_caught(
    folder: Path, student: Student, teacher_folder: Path
) -> None:
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "flip_sin_to_cos": False}))
    with pytest.raises(Refused, match=r"its velocity at s = 0\.1 is .* away from that of the student"):
        verify_folder(folder, content_of(student, teacher_folder))


def test_a_network_that_amplifies_the_rounding_of_its_weights_is_no_damage(
    folder: Path, student: Student, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "rounding_tolerance", lambda count, dtype: 0.0)
    verify_folder(folder, content_of(student, teacher_folder))


def test_what_rounding_explains_grows_with_the_type_and_never_covers_a_lost_bias(student: Student) -> None:
    half, single = (checks.rounding_tolerance(440, dtype) for dtype in (torch.float16, torch.float32))
    assert single < 1e-5 < half < 5e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), r"missing \(model\.diffusion_model\.out\.2\.bias"),
        (lambda t: t.update({"v_pred": torch.zeros(1).half()}), r"unexpected \(v_pred"),
        (
            lambda t: swap(t, "model.diffusion_model.out.0.weight", "model.diffusion_model.out.0.bias"),
            r"out\.0\.\w+ did not come back as written \(it is model\.diffusion_model\.out\.0",
        ),
        (lambda t: t.update({k: v.float() for k, v in t.items()}), "is torch.float32, not torch.float16"),
        (lambda t: None, "its header did not come back"),
    ],
)
def test_a_damaged_single_file_is_caught(
    damage: Damage, message: str, whole: Path, single: Path, tmp_path: Path
) -> None:
    tensors, content = load_file(single), open_export(whole / "diffusers")
    damage(tensors)
    header = {"format": "pt", "modelspec.hash_sha256": tensorfile.hash_tensors(tensors)}
    tensorfile.write(tmp_path / single.name, tensors, header)
    with pytest.raises(Refused, match=message):
        verify_single_file(tmp_path / single.name, content, {**header, "modelspec.prediction_type": "sd3"}, single.name)


def test_a_file_that_stock_diffusers_reads_otherwise_is_never_left(
    folder: Path, student: Student, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.export import ldm as stock
    from stages.export.ldm import export_ldm

    original = stock._open_single_file

    def changed(*args: object) -> object:
        pipeline = original(*args)
        with torch.no_grad():
            pipeline.unet.conv_in.bias += 1
        return pipeline

    monkeypatch.setattr(stock, "_open_single_file", changed)
    with pytest.raises(Refused, match=r"stock diffusers reads another unet\.conv_in\.bias"):
        export_ldm(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_an_export_that_fails_its_verification_never_replaces_a_good_one(
    folder: Path, student: Student, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / UNET).read_bytes()

    def remove_a_bias(_tokenizer: object, _files: object, tokenizer_folder: Path) -> None:
        change(tokenizer_folder.parent / UNET, lambda tensors: tensors.pop("conv_in.bias"))

    monkeypatch.setattr("stages.export.diffusers._keep_tokenizer", remove_a_bias)

    with pytest.raises(Refused, match="missing"):
        export_diffusers(student, teacher_folder, folder.parent, FACTS)
    assert (folder / UNET).read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


def save_run(run: Path, teacher_folder: Path, student: Student) -> Path:
    (run / "checkpoints" / "64").mkdir(parents=True, exist_ok=True)
    save_file(student.unet.state_dict(), run / "checkpoints" / "64" / "ema.safetensors")
    Origin(str(teacher_folder), component_digests(teacher_folder), "hold", "0" * 64).save(run)
    return run


def test_the_command_verifies_an_export_that_lies_there(
    whole: Path, student: Student, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "distill", teacher_folder, student)
    with pytest.raises(Refused, match="no export of ours"):
        main([str(run), "--verify"])
    shutil.copytree(whole, run / "export")
    assert main([str(run), "--verify"]) == 0
    assert capsys.readouterr().out.count(": verified") == 2
    with torch.no_grad():
        student.unet.conv_in.bias += 1
    save_run(run, teacher_folder, student)
    with pytest.raises(Refused, match=r"conv_in\.bias did not come back as written"):
        main([str(run), "--verify"])


def test_files_of_an_earlier_student_do_not_stay_beside_a_newer_folder(
    whole: Path, student: Student, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "export"))
    (out / "theirs-flow.safetensors").write_bytes((teacher_folder / UNET).read_bytes())
    (out / "torn-flow.safetensors").write_bytes(b"torn")
    with torch.no_grad():
        student.unet.conv_in.bias += 1
    export_all(student, teacher_folder, out, FACTS, ExportOptions(single_file=False))
    assert sorted(path.name for path in out.iterdir()) == [
        "diffusers",
        "theirs-flow.safetensors",
        "torn-flow.safetensors",
    ]
    printed = capsys.readouterr().out
    assert f"{out / 'sd-embedded-flow.safetensors'}: removed" in printed
    assert "workflow-comfyui.json: removed" in printed
