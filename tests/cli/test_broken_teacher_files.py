"""Files that no teacher is made of, through the real command: each is refused by what it is, and nothing is written."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cli.test_broken_teachers import caching
from tests.single_files import MODEL, UNET, VAE, averaged, ldm_tensors, part_weights, saved

Make = Callable[[Path], Path]
LDM = ldm_tensors()
UNET_NAMES = [name for name in LDM if name.startswith(UNET)]
CONV_IN, TO_K = f"{UNET}input_blocks.0.0.weight", f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed folders would lie where `refused` looks for changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def tensors(change: Mapping[str, Tensor | None], name: str = "model.safetensors", **metadata: str) -> Make:
    """The embedded teacher's file with these tensors in it, or without them."""

    def make(folder: Path) -> Path:
        held = {key: value for key, value in {**LDM, **change}.items() if value is not None}
        return saved(folder / name, held, metadata)

    return make


def alone(held: Mapping[str, tuple[int, ...]], name: str = "model.safetensors") -> Make:
    """A file of tensors of these shapes."""
    return lambda folder: saved(folder / name, {key: torch.zeros(shape) for key, shape in held.items()})


def parts(*names: str) -> Make:
    return lambda folder: saved(folder / "model.safetensors", ldm_tensors(parts=names))


def content(name: str, text: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(text)
        return folder / name

    return make


def pickle(value: Any, name: str = "model.ckpt", cut: int = 0) -> Make:
    def make(folder: Path) -> Path:
        torch.save(value, folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[: -cut or None])
        return folder / name

    return make


class Hostile:
    """A pickle that makes a folder when an ordinary reader opens it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made-by-a-pickle",)


def cut(folder: Path) -> Path:
    file = saved(folder / "model.safetensors", LDM)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def two_files(folder: Path) -> Path:
    for name in ("a.safetensors", "b.ckpt"):
        (folder / "two").mkdir(exist_ok=True)
        (folder / "two" / name).write_bytes(b"0")
    return folder / "two"


def conv_in(channels: int) -> Make:
    return tensors({CONV_IN: torch.zeros(32, channels, 3, 3)})


ENDS = {"alphas_cumprod": torch.linspace(0.99, 0.3, 1000)}
TABLE: dict[str, tuple[Make, list[str]]] = {
    "no file": (lambda folder: folder / "x.safetensors", ["x.safetensors", "no such file"]),
    "no pickle": (lambda folder: folder / "x.ckpt", ["x.ckpt", "no such file"]),
    "a folder of two files": (two_files, ["a.safetensors", "b.ckpt", "name one"]),
    "a folder of nothing": (
        lambda folder: (folder / "none").mkdir() or folder / "none",
        ["model_index.json", "missing"],
    ),
    "a pipe": (pipe, ["model.safetensors", "a pipe"]),
    "an empty file": (content("model.safetensors", b""), ["is empty"]),
    "an empty pickle": (content("model.ckpt", b""), ["is empty"]),
    "a pointer of Git LFS": (content("m.ckpt", b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "a page of HTML": (content("model.safetensors", b"<html>404</html>"), ["not a whole safetensors file"]),
    "a page of HTML as a pickle": (content("model.ckpt", b"<html>404</html>"), ["no whole file of torch.save"]),
    "a cut file": (cut, ["not a whole safetensors file"]),
    "a cut pickle": (pickle({"state_dict": LDM}, cut=5000), ["no whole file of torch.save"]),
    "a pickle of words": (pickle({"state_dict": {"a": "b"}}), ["holds nothing of an SD-1.x model"]),
    "a hostile pickle without tensors": (pickle({"x": Hostile()}), ["holds nothing of an SD-1.x model"]),
    "inpainting": (conv_in(9), ["inpainting", "9 input channels"]),
    "instruct-pix2pix": (conv_in(8), ["pix2pix", "8 input channels"]),
    "depth": (conv_in(5), ["depth", "5 input channels"]),
    "a latent upscaler": (conv_in(7), ["upscaler", "7 input channels"]),
    "three channels": (conv_in(3), ["other input channels"]),
    "SD2 by its text": (tensors({"cond_stage_model.model.ln_final.bias": torch.zeros(4)}), ["SD2 model"]),
    "SD2 by its width": (tensors({TO_K: torch.zeros(32, 1024)}), ["SD2 model"]),
    "SDXL by its text": (alone({"conditioner.embedders.0.x": (3,), CONV_IN: (32, 4, 3, 3)}), ["SDXL model"]),
    "SDXL by its width": (tensors({TO_K: torch.zeros(32, 2048)}), ["SDXL model"]),
    "an SDXL UNet of diffusers": (
        alone({"conv_in.weight": (320, 4, 3, 3), "add_embedding.linear_1.weight": (8, 8), "down_blocks.0.x": (3,)}),
        ["SDXL model"],
    ),
    "SD3": (alone({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (3, 3)}), ["SD3 model"]),
    "Flux": (alone({"double_blocks.0.img_attn.qkv.weight": (3, 3)}), ["Flux model"]),
    "a LoRA of kohya": (
        alone({"lora_unet_x.lora_down.weight": (4, 3), "lora_unet_x.alpha": ()}),
        ["LoRA", "--teacher.loras"],
    ),
    "a LoRA of peft": (
        alone({"unet.x.lora_A.weight": (4, 3), "unet.x.lora_B.weight": (3, 4)}),
        ["LoRA", "--teacher.loras"],
    ),
    "a LoHa": (alone({"lora_unet_x.hada_w1_a": (4, 3)}), ["LoRA"]),
    "a ControlNet": (alone({"control_model.input_blocks.0.0.weight": (32, 4, 3, 3)}), ["ControlNet"]),
    "a ControlNet of diffusers": (
        alone({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (32, 4, 3, 3)}),
        ["ControlNet"],
    ),
    "a textual inversion": (alone({"emb_params": (2, 768)}), ["textual inversion"]),
    "a textual inversion by its shape": (alone({"<cat>": (768,)}), ["textual inversion"]),
    "a textual inversion of pickle": (
        pickle({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.zeros(2, 768)}}, "x.pt"),
        ["textual inversion"],
    ),
    "a hypernetwork": (pickle({768: [{"linear.weight": torch.zeros(3, 3)}], "name": "x"}, "x.pt"), ["hypernetwork"]),
    "an upscaler": (
        alone({"model.0.weight": (64, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (3, 3)}),
        ["upscaler"],
    ),
    "a motion module": (alone({"down_blocks.0.motion_modules.0.x": (3,)}), ["AnimateDiff"]),
    "an IP-Adapter": (alone({"image_proj.proj.weight": (3, 3)}), ["IP-Adapter"]),
    "an encoder of pictures": (alone({"vision_model.post_layernorm.weight": (3,)}), ["encoder of pictures"]),
    "an autoencoder": (parts("vae"), ["autoencoder alone", "--teacher.vae"]),
    "a text encoder": (parts("text_encoder"), ["text encoder alone", "--teacher.parts-from"]),
    "an autoencoder of diffusers": (
        lambda folder: saved(folder / "model.safetensors", part_weights("vae")),
        ["autoencoder alone"],
    ),
    "a UNet": (parts("unet"), ["no autoencoder and text encoder", "--teacher.parts-from"]),
    "a UNet of diffusers": (
        lambda folder: saved(folder / "u.safetensors", part_weights("unet")),
        ["--teacher.parts-from"],
    ),
    "no text encoder": (parts("unet", "vae"), ["no text encoder", "--teacher.parts-from"]),
    "a missing tensor": (tensors({CONV_IN: None}), ["unet", "1 tensor missing", "conv_in.weight"]),
    "an unknown tensor": (tensors({f"{UNET}extra.weight": torch.zeros(3)}), ["unet", "extra.weight", "unknown"]),
    "another shape": (tensors({f"{UNET}out.2.bias": torch.zeros(5)}), ["conv_out.bias", "[5]", "[4]"]),
    "whole numbers": (tensors({f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.int32)}), ["conv_out.bias", "int32"]),
    "an autoencoder of another shape": (
        tensors({f"{VAE}quant_conv.bias": torch.zeros(3)}),
        ["vae", "quant_conv.bias", "--teacher.config"],
    ),
    "tensors twice": (tensors({f"module.{CONV_IN}": LDM[CONV_IN].clone()}), ["twice"]),
    "averaged weights without one": (
        tensors({**dict.fromkeys(UNET_NAMES), **dict(list(averaged(LDM).items())[1:])}),
        ["unet", "1 tensor missing"],
    ),
    "another schedule": (tensors(ENDS), ["alphas_cumprod", "0.30000", "--teacher.config"]),
    "a model of ours": (tensors({}, **{"sollune.prediction": "velocity"}), ["velocity", "name the teacher"]),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_file_that_is_no_teacher_is_refused_by_what_it_is(name, refused, tmp_path):
    make, named = TABLE[name]
    file = make(tmp_path)
    refused([*caching(tmp_path / "run", file), "--teacher.config", str(MODEL)], *named)
    assert not Path("made-by-a-pickle").exists()


def flow_configs(folder: Path) -> Path:
    """A folder whose scheduler is that of a velocity model."""
    configs = Path(shutil.copytree(MODEL, folder / "flow"))
    file = configs / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"epsilon"', '"flow_prediction"'))
    return configs


def test_configs_of_another_prediction_are_refused_before_anything_is_composed(refused, tmp_path):
    words = [*caching(tmp_path / "run", whole(tmp_path)), "--teacher.config", str(flow_configs(tmp_path))]
    refused(words, "prediction_type", "flow_prediction")


def whole(folder: Path) -> Path:
    return saved(folder / "model.safetensors", LDM)


def taesd(folder: Path) -> Path:
    shutil.copytree(MODEL / "vae", folder / "tiny-vae")
    config = folder / "tiny-vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "AutoencoderTiny"))
    return folder / "tiny-vae"


def other_latents(folder: Path) -> Path:
    shutil.copytree(MODEL / "vae", folder / "vae")
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.1823", "0.13025"))
    return folder / "vae"


def empty_folder(folder: Path) -> Path:
    (folder / "vae").mkdir()
    return folder / "vae"


OPTIONS: dict[str, tuple[Make, list[str], list[str]]] = {
    "a single file without configs": (whole, [], ["model.safetensors", "--teacher.config FOLDER"]),
    "configs that are nowhere": (whole, ["--teacher.config", "no/such"], ["--teacher.config", "no/such"]),
    "configs that are no model": (whole, ["--teacher.config", "FOLDER"], ["model_index.json"]),
    "configs that are a file": (
        whole,
        ["--teacher.config", str(MODEL / "model_index.json")],
        ["--teacher.config", "is a file"],
    ),
    "a blank name": (lambda _: MODEL, ["--teacher.vae", " "], ["teacher.vae", "should name"]),
    "a name of two lines": (lambda _: MODEL, ["--teacher.vae", "a\nb"], ["teacher.vae", "several lines"]),
    "configs of a folder": (lambda _: MODEL, ["--teacher.config", str(MODEL)], ["--teacher.config", "single file"]),
    "parts of a folder": (
        lambda _: MODEL,
        ["--teacher.parts-from", str(MODEL)],
        ["--teacher.parts-from", "leave it out"],
    ),
    "averaged weights of a folder": (lambda _: MODEL, ["--teacher.averaged", "true"], ["--teacher.averaged"]),
    "parts that are there": (whole, ["--teacher.parts-from", str(MODEL)], ["is not needed"]),
    "averaged weights that are not there": (
        whole,
        ["--teacher.config", str(MODEL), "--teacher.averaged", "true"],
        ["model_ema", "--teacher.averaged"],
    ),
    "an autoencoder that is nowhere": (lambda _: MODEL, ["--teacher.vae", "no/such"], ["--teacher.vae", "no/such"]),
    "no file of an autoencoder": (
        lambda _: MODEL,
        ["--teacher.vae", "x.safetensors"],
        ["x.safetensors", "no such file"],
    ),
    "parts that are nowhere": (parts("unet"), ["--teacher.parts-from", "no/such"], ["--teacher.parts-from", "no/such"]),
    "an unknown option": (lambda _: MODEL, ["--teacher.vea", "x"], ["--teacher.vea", "--teacher.vae"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_a_teacher_that_means_nothing_is_refused(name, refused, tmp_path):
    make, words, named = OPTIONS[name]
    words = [str(tmp_path) if word == "FOLDER" else word for word in words]
    refused([*caching(tmp_path / "run", make(tmp_path)), *words], *named)


VAES: dict[str, tuple[Make, list[str]]] = {
    "another class": (taesd, ["--teacher.vae", "AutoencoderTiny"]),
    "other latents": (other_latents, ["--teacher.vae", "scaling_factor is 0.13025"]),
    "a folder of nothing": (empty_folder, ["no weights"]),
    "a UNet": (parts("unet"), ["no autoencoder"]),
    "a LoRA": (alone({"lora_unet_x.lora_down.weight": (4, 3)}), ["is a LoRA"]),
}


@pytest.mark.parametrize("name", VAES)
def test_what_is_no_autoencoder_of_these_latents_is_refused(name, refused, tmp_path):
    make, named = VAES[name]
    refused([*caching(tmp_path / "run", MODEL), "--teacher.vae", str(make(tmp_path))], *named)


def test_a_full_disk_is_refused_before_anything_is_composed(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.teacher_files.compose.free_bytes", lambda _: 1000)
    words = [*caching(tmp_path / "run", whole(tmp_path)), "--teacher.config", str(MODEL)]
    refused(words, "composed teacher needs", "XDG_CACHE_HOME")


def test_a_cache_home_that_cannot_be_made_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    refused([*caching(tmp_path / "run", whole(tmp_path)), "--teacher.config", str(MODEL)], "home", "cannot be written")
