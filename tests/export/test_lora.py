"""Exported adapters: stock diffusers adds them to the base's export and has the merged model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.export import tensorfile
from stages.export.diffusers import export_diffusers
from stages.export.lora import LORA_FILE, export_lora, to_kohya, verify_lora
from stages.export.verify_export import ExportOptions
from stages.nets.components import Components, load_components
from stages.nets.lora import LoraConfig, adapter_parameters, add_adapters, lora_state_dict
from stages.nets.run_folder import WEIGHTS_FILE, Origin, SavedRun, load_student, open_run, save_base
from stages.nets.student import Student
from stages.system.refusal import Refused

CONFIG = LoraConfig(rank=3, alpha=6, modules=("attention", "feed_forward", "resnet"))
FACTS: dict[str, Any] = {"samples": 64, "tail": "hold", "teacher": "tiny"}


@pytest.fixture(scope="module")
def parts(teacher_folder: Path) -> Components:
    return load_components(str(teacher_folder), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def base(exported: Path) -> Student:
    return Student(StableDiffusionPipeline.from_pretrained(exported).unet)


@pytest.fixture(scope="module")
def run(base: Student, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    folder = tmp_path_factory.mktemp("run")
    origin = Origin(str(teacher_folder), {}, "hold", "abc").with_lora(CONFIG)
    save_base(folder, origin, base)
    origin.save(folder)
    generator = torch.Generator().manual_seed(1)
    grown = add_adapters(Student.from_teacher(base.unet), CONFIG)
    tensors = {
        name: torch.randn(value.shape, generator=generator) / 10 for name, value in adapter_parameters(grown).items()
    }
    checkpoint = folder / "checkpoints" / "000000064"
    checkpoint.mkdir(parents=True)
    save_file(tensors, checkpoint / WEIGHTS_FILE)
    return open_run(folder)


@pytest.fixture(scope="module")
def out(run: SavedRun, parts: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the run: the merged model in fp32, and both files of adapters."""
    out = tmp_path_factory.mktemp("out")
    export_diffusers(load_student(run, parts), parts.folder, out, FACTS, ExportOptions(dtype="float32"))
    export_lora(run, out)
    return out


def files(out: Path) -> tuple[Path, Path]:
    return out / "lora" / LORA_FILE, next(out.glob("*-flow-lora.safetensors"))


def sampled(pipeline: StableDiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    drawn: Tensor = pipeline("a red star", 64, 64, 3, guidance_scale=4.0, latents=noise, output_type="latent").images
    return drawn


def velocity(pipeline: StableDiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    x, cond = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    with torch.no_grad():
        return pipeline.unet(x, torch.tensor(321.0), cond).sample


@pytest.mark.parametrize("layout", [0, 1], ids=["diffusers", "kohya"])
def test_the_stock_pipeline_of_the_base_with_the_adapters_samples_as_the_merged_model(
    out: Path, exported: Path, layout: int
) -> None:
    file = files(out)[layout]
    whole, based = (StableDiffusionPipeline.from_pretrained(folder) for folder in (out / "diffusers", exported))
    bare = sampled(based), velocity(based)
    based.load_lora_weights(file.parent, **({} if file.name == LORA_FILE else {"weight_name": file.name}))
    for plain, measure in zip(bare, (sampled, velocity), strict=True):
        merged, added = measure(whole), measure(based)
        assert (merged - plain).abs().max() > 0.01  # the adapters do change it
        assert (added - merged).abs().max() <= 1e-4


def test_a_trip_to_kohyas_names_and_back_by_diffusers_own_way_loses_nothing(out: Path) -> None:
    here, there = (load_file(file) for file in files(out))
    back, alphas = _convert_non_diffusers_lora_to_diffusers(dict(there))
    assert set(alphas.values()) == {3.0}
    assert len(back) == len(here)
    assert there.keys() == to_kohya(here).keys()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    kohya = f"lora_unet_{name.replace('.', '_')}"
    assert torch.equal(there[f"{kohya}.lora_down.weight"], here[f"unet.{name}.lora_A.weight"])
    assert torch.equal(there[f"{kohya}.lora_up.weight"], here[f"unet.{name}.lora_B.weight"])


def test_the_metadata_name_the_base_model_and_hold_the_keys_of_lora_pickers(out: Path, exported: Path) -> None:
    base = json.loads((exported / "sollune.json").read_text())["student_sha256"]
    for file in files(out):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert "not its teacher" in metadata["sollune.base"]
        assert metadata["sollune.base_student_sha256"] == base
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert metadata["modelspec.hash_sha256"] == tensorfile.hash_file_tensors(file)
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "3")
    assert json.loads(metadata["ss_network_args"]) == {"conv_alpha": "3", "conv_dim": "3"}


def test_the_same_export_gives_the_same_bytes_and_leaves_nothing_else(out: Path, run: SavedRun) -> None:
    before = [file.read_bytes() for file in files(out)]
    export_lora(run, out)
    assert [file.read_bytes() for file in files(out)] == before
    assert sorted(path.name for path in out.iterdir()) == sorted(["diffusers", "lora", files(out)[1].name])


def test_adapters_that_do_not_come_back_are_refused_and_the_earlier_files_stay(
    out: Path, run: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = [file.read_bytes() for file in files(out)], tensorfile.write

    def forgetful(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        write(path, {name: value for name, value in tensors.items() if "mid_block" not in name}, metadata)

    monkeypatch.setattr(tensorfile, "write", forgetful)
    with pytest.raises(Refused, match=f"{LORA_FILE}: .* tensors are missing"):
        export_lora(run, out)
    assert [file.read_bytes() for file in files(out)] == before


def test_a_merged_model_that_is_another_is_noticed(out: Path, run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.export.lora.load_student", lambda _run, parts: Student.from_teacher(parts.unet))
    with pytest.raises(Refused, match=f"{LORA_FILE}: with it the velocity of stock diffusers are"):
        export_lora(run, out)


def test_adapters_that_count_twice_elsewhere_are_refused(
    out: Path, run: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loud(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 2 * value if name.endswith(".alpha") else value for name, value in to_kohya(tensors).items()}

    monkeypatch.setattr("stages.export.lora.to_kohya", loud)
    with pytest.raises(Refused, match=r"-flow-lora\.safetensors: with it the velocity of stock diffusers are"):
        export_lora(run, out)


def test_an_export_that_lies_there_is_held_against_the_run(out: Path, run: SavedRun, tmp_path: Path) -> None:
    own = Path(shutil.copytree(out, tmp_path / "own"))
    assert verify_lora(run, own) == (own / "lora", files(own)[1])
    content = bytearray(files(own)[0].read_bytes())
    content[-1] ^= 1
    files(own)[0].write_bytes(content)
    with pytest.raises(Refused, match=f"{LORA_FILE}: .* did not come back as written"):
        verify_lora(run, own)
    files(own)[0].unlink()
    with pytest.raises(Refused, match="export the run first"):
        verify_lora(run, own)


def test_a_run_without_adapters_has_none_to_export(tmp_path: Path, run: SavedRun) -> None:
    whole = SavedRun(run.folder, Origin("tiny", {}, "hold", "abc"), run.weights, run.samples)
    assert export_lora(whole, tmp_path) == ()
    assert not list(tmp_path.iterdir())


def test_layers_are_named_as_diffusers_users_expect(base: Student) -> None:
    grown = add_adapters(Student.from_teacher(base.unet), LoraConfig(rank=1))
    ends = {name.split(".lora_")[0].rpartition("attn")[2][2:] for name in lora_state_dict(grown, 1.0)}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}
