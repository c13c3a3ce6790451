"""Laws of the audit: an intact cache passes, and a change of any teacher tensor or stored value is an error."""

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs.load import load
from configs.values import PictureSize
from shards.manifest import Manifest
from shards.record import Record
from stages import cache_teacher, finetune_classes, upkeep
from stages.cache.audit import ROUNDINGS, SINGLE, Comparison, RecordAudit, audit_record, load_recorded_teacher, sample
from stages.nets.run_folder import Origin
from stages.nets.teacher import Teacher
from stages.system.refusal import Refused

MODEL = Path("stages/tiny/model")
FEW = ["--count", "8", "--validation-count", "2", "--render.records-per-shard", "4", "--render.states.steps", "6"]

SMALL = [
    "--count",
    "1",
    "--validation-count",
    "1",
    "--render.states.steps",
    "4",
    "--render.states.renoised-states",
    "1",
]


def filled(run: Path, *more: str) -> Path:
    config = load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], ["--run", str(run), *FEW, *more])
    cache_teacher.run(config)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("runs") / "good")


@pytest.fixture(scope="module")
def teacher(run: Path) -> Teacher:
    return load_recorded_teacher(Manifest.open(run / "cache"), str(MODEL), torch.device("cpu"))


@pytest.fixture(scope="module")
def records(run: Path) -> list[tuple[str, Record]]:
    return list(sample(run / "cache", Manifest.open(run / "cache"), 4, 0))


def worst(teacher: Teacher, records: list[tuple[str, Record]]) -> Comparison:
    comparisons = [audit_record(teacher, record, file, tf32=False).worst() for file, record in records]
    return max(comparisons, key=lambda one: one.error_ratio)


@contextmanager
def changed(tensor: torch.Tensor) -> Iterator[None]:
    """One tensor 1 % larger for a while."""
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.mul_(1.01)
    yield
    with torch.no_grad():
        tensor.copy_(before)


def test_the_same_records_are_sampled_from_a_seed_each_once(run: Path) -> None:
    manifest = Manifest.open(run / "cache")

    def chosen(count: int, seed: int) -> list[tuple[str, str]]:
        return [(file, record.key) for file, record in sample(run / "cache", manifest, count, seed)]

    assert chosen(5, 1) == chosen(5, 1) != chosen(5, 2)
    assert len(set(chosen(10, 0))) == len(chosen(99, 0)) == 10


def test_a_good_cache_passes_with_a_wide_margin(teacher: Teacher, records: list[tuple[str, Record]]) -> None:
    assert worst(teacher, records).error_ratio < 0.5


def test_one_weight_of_the_unet_changed_by_a_percent_is_detected_wherever_it_is(
    teacher: Teacher, records: list[tuple[str, Record]]
) -> None:
    """All but the queries and keys of the middle block, whose picture is one pixel: attention to one thing is 1."""
    weights = {name: one for name, one in teacher.components.unet.named_parameters() if name.endswith("weight")}
    for name in random.Random(0).sample(sorted(weights), 12):
        with changed(weights[name]):
            assert worst(teacher, records[:2]).error_ratio > 1, name
    assert worst(teacher, records).error_ratio < 0.5


def test_one_weight_of_the_text_encoder_changed_by_a_percent_is_detected_in_the_sentence(
    teacher: Teacher, records: list[tuple[str, Record]]
) -> None:
    with changed(teacher.components.text_encoder.get_parameter("encoder.layers.1.mlp.fc1.weight")):
        audits = [audit_record(teacher, record, file, False) for file, record in records]
    bad = {one.quantity for audit in audits for one in audit.comparisons if one.error_ratio > 1}
    assert "cond" in bad


def test_a_kernel_that_is_wrong_for_one_channel_is_detected(
    teacher: Teacher, records: list[tuple[str, Record]]
) -> None:
    def broken(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1] * 1.001, output[:, 1:]], dim=1)

    hook = teacher.components.unet.up_blocks[2].resnets[0].conv1.register_forward_hook(broken)
    assert worst(teacher, records).error_ratio > 1
    hook.remove()


def test_outputs_that_are_not_finite_are_errors(teacher: Teacher, records: list[tuple[str, Record]]) -> None:
    hook = teacher.components.unet.conv_out.register_forward_hook(
        lambda _module, _inputs, output: output * float("nan")
    )
    assert worst(teacher, records).error_ratio == float("inf")
    hook.remove()


def test_what_does_not_belong_to_the_sentence_or_the_step_is_detected(
    teacher: Teacher, records: list[tuple[str, Record]]
) -> None:
    file, record = records[0]
    other = replace(record, text=records[1][1].text)
    assert audit_record(teacher, other, file, False).worst().quantity == "cond"
    states = replace(record.states, k=(record.states.k + 1).clamp_max(999))
    bad = [
        one.quantity
        for one in audit_record(teacher, replace(record, states=states), file, False).comparisons
        if one.error_ratio > 1
    ]
    assert "k" in bad


def test_errors_are_measured_in_tolerances() -> None:
    one = Comparison("v_cond", 0.5, 3e-6, ROUNDINGS * SINGLE)
    assert one.error_ratio == pytest.approx(3e-6 / 7.63e-6, rel=1e-3)
    assert Comparison("k", 0.5, 0.0, 0.0).error_ratio == 0
    assert (
        RecordAudit("a.tar", "000000000", PictureSize(64, 64), [one, Comparison("k", 0.5, 1.0, 0.0)]).worst().quantity
        == "k"
    )


def test_a_teacher_of_another_size_is_refused(teacher: Teacher, records: list[tuple[str, Record]]) -> None:
    file, record = records[0]
    with pytest.raises(Refused, match=rf"record {record.key}: cond has shape \(7, 64\), this teacher's has"):
        audit_record(teacher, replace(record, cond=record.cond[:7]), file, False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_command_passes_on_a_good_cache(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    made = run if dtype == "float32" else filled(tmp_path / "half", *SMALL, "--dtype", dtype)
    assert upkeep.main(["verify", str(made), "--deep", "--sample", "6"]) == 0
    printed = capsys.readouterr().out
    assert "the one that the recipe names" in printed
    assert printed.rstrip().endswith("the outputs are the same")


@pytest.mark.parametrize("named", [True, False])
def test_the_command_fails_on_a_cache_of_another_teacher(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Also when the files do not differ: then the outputs do."""
    other = shutil.copytree(MODEL, tmp_path / "other")
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["down_blocks.1.resnets.0.conv1.weight"] *= 1.01
    save_file(weights, file, {"format": "pt"})
    if not named:
        monkeypatch.setattr("stages.upkeep.other_parts", lambda manifest, teacher: iter(()))
    assert upkeep.main(["verify", str(run), "--deep", "--sample", "3", "--teacher", str(other)]) == 1
    printed = capsys.readouterr()
    assert ("unet is not what the recipe names" in printed.err) == named
    lines = [line for line in printed.err.splitlines() if ": record 0000000" in line]
    assert len(lines) == 3
    assert all("is off by" in line and "tolerance 7.6e-06" in line and "--teacher" in line for line in lines)


def test_a_damaged_cache_is_not_audited(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "cache" / "journal" / "train-000000.json").write_text("{}")
    assert upkeep.main(["verify", str(copy), "--deep"]) == 1
    assert "audit" not in capsys.readouterr().out


def test_a_cache_without_its_configuration_needs_the_location_of_its_teacher(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run / "cache", tmp_path / "published")
    with pytest.raises(Refused, match="nothing says how"):
        upkeep.main(["verify", str(copy), "--deep"])
    assert upkeep.main(["verify", str(copy), "--deep", "--sample", "1", "--teacher", str(MODEL)]) == 0


def test_a_record_is_shown_with_its_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "picture.png"
    assert upkeep.main(["show", str(run), "000000001", "--split", "validation", "--picture", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "key             000000001" in printed
    assert f"picture: {file}" in printed
    with Image.open(file) as image:
        assert image.width > 6 * image.height


def test_a_record_is_shown_where_no_teacher_can_be_found(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run / "cache", tmp_path / "published")
    monkeypatch.chdir(tmp_path)
    assert upkeep.main(["show", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "key             000000000" in printed
    assert "no picture: " in printed
    assert not list(tmp_path.glob("*.png"))


@pytest.fixture(scope="module")
def class_folder(run: Path) -> Path:
    """The class pictures of a run, as finetune-classes leaves them before training."""
    classes = run / "classes.yaml"
    classes.write_text(
        "classes: [{name: star, pattern: star/*, priority: top}, {name: moon, pattern: moon/*, priority: low}]"
    )
    few = ["--count", "6", "--render.records-per-shard", "3", "--render.states.steps", "4"]
    words = ["--run", str(run), "--classes", str(classes), *few]
    config = load(finetune_classes.Config, "finetune_classes", [Path("configs/tiny.yaml")], words)
    origin = Origin.from_manifest(Manifest.open(run / "cache"))
    finetune_classes.refill_class_cache(config, origin)
    finetune_classes.save_settings(config, origin)
    return run / "classes"


def test_the_pictures_of_classes_are_audited_and_repaired_too(
    class_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upkeep.main(["verify", str(class_folder), "--deep", "--sample", "3"]) == 0
    file = class_folder / "cache" / "data" / "train-000001.tar"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000] + b"x" * 1000)
    (class_folder.parent / "classes.yaml").unlink()  # the one that lies beside the pictures is enough
    assert upkeep.main(["repair", str(class_folder)]) == 0
    assert file.read_bytes() == whole
