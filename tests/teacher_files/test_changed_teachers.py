"""A teacher with LoRAs, clip skip or another autoencoder computes what the stock pipeline does with the same."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.nets.components import Components, load_components
from stages.nets.teacher import Teacher
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.source import LoraFile, TeacherSource
from stages.teacher_files.variants import WEIGHT_FILES
from tests import lora_files as made
from tests.single_files import MODEL

TOLERANCE = 1e-5
PAIRS = made.random_pairs(*made.ATTENTION, "conv1", *made.TEXT_LAYERS)
CPU = torch.device("cpu")
PROMPT = "a large red circle"


@pytest.fixture(autouse=True, scope="module")
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def opened(**options: Any) -> Path:
    return open_teacher_files(TeacherSource(location=str(made.TEACHER), **options)).folder


def stock(folder: Path = made.TEACHER) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fused(file: Path, scale: float) -> StableDiffusionPipeline:
    pipeline = stock()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora(components=["unet", "text_encoder"], lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline


def encoded(pipeline: StableDiffusionPipeline, text: str, skip: int | None = None) -> Tensor:
    # Its clip_skip looks for an attribute that transformers 5.6 took away; as a submodule it would hold itself.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    with torch.no_grad():
        cond: Tensor = pipeline.encode_prompt(text, CPU, 1, False, clip_skip=skip)[0]
    return cond


def predicted(pipeline: StableDiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    x, cond = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 64, generator=generator)
    with torch.no_grad():
        answer: Tensor = pipeline.unet(x, torch.tensor(321), cond).sample
    return answer


def drawn(pipeline: StableDiffusionPipeline, skip: int | None = None, guidance: float = 4.0) -> Tensor:
    """Latents of a whole run; stock clip_skip leaves the negative prompt as it is, so it is encoded here."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = {"num_inference_steps": 4, "guidance_scale": guidance, "latents": noise, "output_type": "latent"}
    if skip is not None:
        settings |= {"clip_skip": skip, "negative_prompt_embeds": encoded(pipeline, "", skip)}
    latents: Tensor = pipeline(PROMPT, 64, 64, **settings).images
    return latents


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("naming", [made.kohya, made.peft, made.diffusers], ids=["kohya", "peft", "diffusers"])
def test_a_teacher_with_a_lora_computes_what_stock_diffusers_does_with_it(naming: Any, tmp_path: Path) -> None:
    pairs = (
        PAIRS if naming is not made.diffusers else {name: pair for name, pair in PAIRS.items() if "conv" not in name}
    )
    file = made.write(naming(pairs), tmp_path / "style.safetensors")
    ours, theirs = stock(opened(loras=(LoraFile(file=str(file), scale=0.8),))), fused(file, 0.8)
    for measure, least in ((predicted, 0.01), (lambda pipeline: encoded(pipeline, PROMPT), 0.01), (drawn, 0.01)):
        assert difference(measure(ours), measure(theirs)) <= TOLERANCE
        assert difference(measure(ours), measure(stock())) > least


def test_every_file_that_a_merged_teacher_is_made_of_is_named(tmp_path: Path) -> None:
    file = made.write(made.kohya(PAIRS), tmp_path / "a.safetensors")
    teacher = open_teacher_files(TeacherSource(location=str(MODEL), loras=(LoraFile(file=str(file)),), clip_skip=1))
    weights = {MODEL / part / WEIGHT_FILES[part][0] for part in WEIGHT_FILES}
    assert {source.path for source in teacher.sources} == {file, *weights}
    assert [source.role for source in teacher.sources] == ["lora", "unet", "vae", "text_encoder"]


def test_a_lora_may_be_named_by_its_file_alone() -> None:
    named = TeacherSource.model_validate({"location": "x", "loras": ["a.safetensors"]})
    assert named.loras == (LoraFile(file="a.safetensors", scale=1.0),)


def test_a_file_of_torch_save_is_the_same_lora(tmp_path: Path) -> None:
    tensors = made.kohya(PAIRS)
    whole = made.write(tensors, tmp_path / "a.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "b.pt")
    folders = [opened(loras=(LoraFile(file=str(file)),)) for file in (whole, tmp_path / "b.pt")]
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, other = (load_file(folder / part) for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_is_that_of_stock_diffusers_in_texts_and_in_whole_runs(skip: int) -> None:
    ours, theirs = stock(opened(clip_skip=skip)), stock()
    for text in (PROMPT, "", "two small blue stars"):
        assert difference(encoded(ours, text), encoded(theirs, text, skip)) <= TOLERANCE
        assert difference(encoded(ours, text), encoded(theirs, text)) > 0.01
    assert difference(drawn(ours), drawn(theirs, skip)) <= TOLERANCE
    assert difference(drawn(ours, guidance=1.0), drawn(theirs, skip, guidance=1.0)) <= TOLERANCE


def test_the_teacher_itself_reads_its_texts_so(tmp_path: Path) -> None:
    file = made.write(made.kohya(PAIRS), tmp_path / "style.safetensors")
    folder = opened(clip_skip=1, loras=(LoraFile(file=str(file), scale=-0.5),))
    teacher = Teacher(components(folder), "hold")
    expected = torch.cat([encoded(fused(file, -0.5), text, 1) for text in (PROMPT, "")])
    assert difference(teacher.encode_texts([PROMPT, ""]).float(), expected) <= 1e-3  # stored in fp16
    text_encoder = teacher.components.text_encoder
    tokens = teacher.components.tokenizer([PROMPT, ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert difference(text_encoder(tokens)[0], expected) <= TOLERANCE


def test_skipped_layers_are_merged_too_so_that_the_whole_encoder_is_the_merged_one(tmp_path: Path) -> None:
    file = made.write(made.kohya(PAIRS), tmp_path / "style.safetensors")
    loras = (LoraFile(file=str(file)),)
    cut, whole = opened(clip_skip=2, loras=loras), opened(loras=loras)
    parts = load_file(cut / "text_encoder/model.safetensors") | load_file(
        cut / "text_encoder/skipped_layers.safetensors"
    )
    expected = load_file(whole / "text_encoder/model.safetensors")
    assert parts.keys() == expected.keys()
    assert all(torch.equal(parts[key], expected[key]) for key in expected)


def test_a_folder_that_ends_early_already_keeps_its_other_layers_whatever_is_changed(tmp_path: Path) -> None:
    file = made.write(made.kohya(PAIRS), tmp_path / "style.safetensors")
    loras = (LoraFile(file=str(file)),)
    shorter = Path(shutil.copytree(opened(clip_skip=1), tmp_path / "shorter"))
    again = open_teacher_files(TeacherSource(location=str(shorter), clip_skip=1, loras=loras)).folder
    at_once = opened(clip_skip=2, loras=loras)
    for name in ("model.safetensors", "skipped_layers.safetensors"):
        one, other = (load_file(folder / "text_encoder" / name) for folder in (again, at_once))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    with_vae = open_teacher_files(
        TeacherSource(location=str(shorter), vae=str(made.TEACHER), prediction="v_prediction")
    )
    assert (with_vae.folder / "text_encoder/skipped_layers.safetensors").is_file()


@pytest.fixture
def other_vae(tmp_path: Path) -> Path:
    """An autoencoder that is another, alone in a folder."""
    folder = Path(shutil.copytree(made.TEACHER / "vae", tmp_path / "other-vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    changed = {
        name: value + 0.05 * value.std(correction=0) * torch.randn(value.shape, generator=generator)
        for name, value in load_file(file).items()
    }
    save_file(changed, file, {"format": "pt"})
    return folder


def test_pictures_are_decoded_and_encoded_by_the_other_autoencoder(other_vae: Path) -> None:
    parts = components(opened(vae=str(other_vae)))
    theirs = AutoencoderKL.from_pretrained(other_vae)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        picture = theirs.decode(latents).sample
        assert difference(parts.vae.decode(latents).sample, picture) <= TOLERANCE
        assert difference(components(made.TEACHER).vae.decode(latents).sample, picture) > 0.01
    assert torch.equal(parts.unet.conv_in.weight, components(made.TEACHER).unet.conv_in.weight)


def components(folder: Path) -> Components:
    return load_components(str(folder), CPU, torch.float32)
