"""The original experiment's checkpoint is imported and exported, and no code in it is run."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from stages import export
from stages.__main__ import main
from stages.nets.components import load_components
from stages.nets.original_checkpoint import OriginalCheckpoint, read_original
from stages.nets.run_folder import Origin, load_run_teacher, load_student, open_run
from stages.sampling.models import load_model
from stages.system.refusal import Refused

TEACHER = "stages/tiny/model"
CPU = torch.device("cpu")
CFG = {"run_name": "sd15_flowmatch_david", "active_blocks": ("down_0", "mid"), "batch_size": 32, "amp": True}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return load_components(TEACHER, CPU, torch.float32).unet


@pytest.fixture(scope="module")
def weights(unet: UNet2DConditionModel) -> Weights:
    """A student that differs from the embedded teacher in every tensor."""
    generator = torch.Generator().manual_seed(0)
    teacher = unet.state_dict()
    return {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in teacher.items()}


def written(file: Path, student: Weights, prefix: str = "unet.", **changes: object) -> Path:
    """The file as the original's trainer would have saved it."""
    keyed = OrderedDict((prefix + name, value) for name, value in student.items())
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    content = {"cfg": CFG, "student": keyed, "opt": optimizer.state_dict(), "sched": schedule.state_dict(), "gstep": 6}
    torch.save({**content, **changes}, file)
    return file


def test_an_original_becomes_a_run_that_samples_and_exports(tmp_path: Path, weights: Weights) -> None:
    file, run = written(tmp_path / "e11.pt", weights), tmp_path / "run"
    assert main(["import", str(file), "--teacher", TEACHER, "--out", str(run)]) == 0
    saved = open_run(run)
    assert (saved.samples, saved.origin.target, saved.origin.tail) == (192, "vp_v", "hold")
    student = load_student(saved, load_run_teacher(saved.origin, CPU, torch.float32))
    assert student.vp_bridge is not None
    assert all(torch.equal(value, weights[name]) for name, value in student.unet.state_dict().items())
    assert load_model(str(run), "cpu").latents.latent_shape() == (4, 8, 8)
    (folder,) = export.run(export.Config(run=run, out=tmp_path / "out", dtype="float32"))
    assert torch.equal(
        load_file(folder / "unet/diffusion_pytorch_model.safetensors")["conv_in.bias"], weights["conv_in.bias"]
    )


@pytest.mark.parametrize("prefix", ["", "unet.", "module.unet.", "_orig_mod.unet.", "module._orig_mod."])
def test_the_prefixes_of_wrappers_are_removed_from_keys(
    tmp_path: Path, unet: UNet2DConditionModel, weights: Weights, prefix: str
) -> None:
    stored = read_original(written(tmp_path / "e.pt", weights, prefix)).weights(unet)
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())


def test_what_goes_out_comes_back_to_the_last_bit(tmp_path: Path, weights: Weights) -> None:
    file = written(tmp_path / "e.pt", weights)
    assert main(["import", str(file), "--teacher", TEACHER, "--out", str(tmp_path / "a"), "--target", "velocity"]) == 0
    out = ["--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(["export", str(tmp_path / "a"), "--to", "pt", *out, "--verify"]) == 2  # which writes nothing
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "a"), "--to", "pt", *out]) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "model-flow.pt"
    content = torch.load(file, weights_only=True)
    assert list(content) == ["cfg", "student", "opt", "sched", "gstep"]
    assert (content["gstep"], content["cfg"]["batch_size"], content["cfg"]["model_id"]) == (6, 32, "model")
    assert content["student"].keys() == {f"unet.{name}" for name in weights}
    assert main(["import", str(file), "--teacher", TEACHER, "--out", str(tmp_path / "b")]) == 0
    first, second = open_run(tmp_path / "a"), open_run(tmp_path / "b")
    assert second.weights.read_bytes() == first.weights.read_bytes()
    assert second.samples == first.samples
    assert Origin.open(tmp_path / "b") == Origin.open(tmp_path / "a")


class Hostile:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path: Path, weights: Weights, zipped: bool) -> None:
    file, mark = tmp_path / "e.pt", tmp_path / "mark"
    content = {"cfg": CFG, "student": weights, "sched": Hostile(mark), "gstep": 6}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refused, match=r"e\.pt: asks to run posix\.mkdir, and no code of a file is run"):
        read_original(file)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # so it was hostile


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"cfg": 1}), b"PK\x03\x04" + bytes(64)])
def test_what_is_no_file_of_torch_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.pt").write_bytes(content)
    with pytest.raises(Refused, match=r"e\.pt: is no whole file of torch\.save"):
        read_original(tmp_path / "e.pt")


def test_a_cut_file_is_refused(tmp_path: Path, weights: Weights) -> None:
    file = written(tmp_path / "e.pt", weights)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Refused, match="is no whole file"):
        read_original(file)
    with pytest.raises(Refused, match="cannot be read"):
        read_original(tmp_path / "none.pt")


def test_other_dictionaries_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "e.pt")
    with pytest.raises(Refused, match="no checkpoint of the original experiment"):
        read_original(tmp_path / "e.pt")
    torch.save({"cfg": {}, "student": {}, "gstep": "six"}, tmp_path / "e.pt")
    with pytest.raises(Refused, match="gstep a whole number"):
        read_original(tmp_path / "e.pt")


def test_the_first_tensor_that_does_not_fit_is_named(unet: UNet2DConditionModel, weights: Weights) -> None:

    def refused(student: dict[str, object], *words: str) -> None:
        with pytest.raises(Refused) as refusal:
            OriginalCheckpoint(Path("e.pt"), {}, student, 1).weights(unet)  # type: ignore[arg-type]
        assert all(word in str(refusal.value) for word in words)

    refused({**weights, "local_heads.mid.weight": torch.zeros(1)}, "local_heads.mid.weight is none of the UNet's")
    refused({name: value for name, value in weights.items() if name != "conv_in.bias"}, "conv_in.bias is missing")
    refused({**weights, "conv_in.bias": torch.zeros(3)}, "conv_in.bias is [3]")
    refused({**weights, "conv_in.bias": weights["conv_in.bias"] * torch.nan}, "conv_in.bias holds values")
    refused({**weights, "conv_in.bias": 3}, "conv_in.bias is no tensor but int")
    refused({**weights, "unet.conv_in.bias": torch.zeros(1)}, "conv_in.bias comes twice")
    refused(dict(unet.state_dict()), "holds the teacher's own weights")


def test_samples_are_required_when_the_file_does_not_hold_them(tmp_path: Path, weights: Weights) -> None:
    file, out = written(tmp_path / "e.pt", weights, cfg={}), ["--teacher", TEACHER, "--out", str(tmp_path / "run")]
    assert main(["import", str(file), *out]) == 2
    assert not (tmp_path / "run").exists()
    assert main(["import", str(file), *out, "--samples", "77"]) == 0
    assert open_run(tmp_path / "run").samples == 77
    assert main(["import", str(file), *out, "--samples", "77"]) == 2  # a run lies there now
