"""LoRAs, autoencoders and clip skip that do not fit, through the real command: each is refused by what it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import lora_files as made
from tests.cli.conftest import TEACHER
from tests.cli.test_broken_teachers import caching

Make = Callable[[Path], Path]
"""Writes the file of a row into a folder and returns its path."""
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT = f"{LAYER}.lora_A.weight"
DOWN, UP, ALPHA = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight", f"{NAME}.alpha"
ONE = made.random_pairs("attn2.to_k")


def lora(change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None) -> Make:
    """A file of kohya's names with one thing changed in place."""

    def make(folder: Path) -> Path:
        tensors = made.kohya({LAYER: ONE[LAYER]})
        change(tensors)
        return made.write(tensors, folder / "style.safetensors", metadata)

    return make


def peft(change: Callable[[dict[str, Tensor]], object], **settings: object) -> Make:
    """A file of peft's names with one thing changed, and these settings of the UNet in its metadata."""

    def make(folder: Path) -> Path:
        tensors = made.peft({LAYER: ONE[LAYER]})
        change(tensors)
        text = json.dumps({f"unet.{key}": value for key, value in settings.items()})
        return made.write(tensors, folder / "style.safetensors", {"lora_adapter_metadata": text} if settings else None)

    return make


def added(key: str, *shape: int) -> Make:
    return lora(lambda tensors: tensors.update({key: torch.ones(shape)}))


def alone(key: str, *shape: int) -> Make:
    """A file of this tensor alone."""
    return lora(lambda tensors: (tensors.clear(), tensors.update({key: torch.ones(shape)})))


def pair(name: str, *sizes: int, metadata: dict[str, str] | None = None) -> Make:
    """A pair of another layer, from `sizes[0]` to `sizes[1]` values."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors[f"{name}.lora_down.weight"] = torch.ones(4, sizes[0])
        tensors[f"{name}.lora_up.weight"] = torch.ones(sizes[1], 4)

    return lora(change, metadata)


def spoilt(key: str, value: float) -> Make:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = value

    return lora(change)


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


def content(name: str, text: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(text)
        return folder / name

    return make


def cut(folder: Path) -> Path:
    file = lora(nothing)(folder)
    file.write_bytes(file.read_bytes()[:-9])
    return file


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "style.safetensors")
    return folder / "style.safetensors"


def no_torch_file(folder: Path) -> Path:
    torch.save([1, 2, 3], folder / "style.pt")
    return folder / "style.pt"


SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TABLE: dict[str, tuple[Make, list[str]]] = {
    "no file": (lambda folder: folder / "style.safetensors", ["style.safetensors", "does not exist"]),
    "a folder": (lambda folder: folder, ["a folder"]),
    "a pipe": (pipe, ["style.safetensors", "a pipe"]),
    "an empty file": (content("style.safetensors", b""), ["lora: ", "style.safetensors", "is empty"]),
    "a page of the web": (content("style.safetensors", b"<!DOCTYPE html>"), ["not a whole safetensors file"]),
    "a cut file": (cut, ["style.safetensors", "not a whole safetensors file"]),
    "a torch file of numbers": (no_torch_file, ["style.pt"]),
    "text under the name of torch": (content("style.ckpt", b"no pickle"), ["style.ckpt"]),
    "no tensors": (lora(dict.clear), ["holds no tensor"]),
    "a whole model": (
        lambda folder: made.write(made.embedded_weights(), folder / "model.safetensors"),
        ["model.safetensors", "holds no low-rank pair"],
    ),
    "DoRA": (added(f"{NAME}.dora_scale", 64, 1), [f"{NAME}.dora_scale", "DoRA"]),
    "DoRA of peft": (
        peft(lambda tensors: tensors.update({f"{LAYER}.lora_magnitude_vector": torch.ones(64)})), ["DoRA"]
    ),
    "DoRA by its settings": (peft(nothing, r=3, lora_alpha=3, use_dora=True), ["use_dora", "DoRA"]),
    "LoHa": (alone(f"{NAME}.hada_w1_a", 64, 4), ["hada_w1_a", "LoHa"]),
    "LoKr": (alone(f"{NAME}.lokr_w1", 8, 8), ["lokr_w1", "LoKr"]),
    "OFT": (alone(f"{NAME}.oft_blocks", 4, 16, 16), ["oft_blocks", "OFT"]),
    "BOFT": (alone(f"unet.{LAYER}.boft_R", 4, 16, 16), ["boft_R", "BOFT"]),
    "GLoRA": (alone(f"{NAME}.a1.weight", 4, 64), ["a1.weight", "GLoRA"]),
    "IA3": (alone(f"{NAME}.on_input", 1), ["on_input", "IA3"]),
    "norm tuning": (alone("lora_unet_conv_norm_out.w_norm", 32), ["w_norm", "norm tuning"]),
    "a difference of weights": (added("lora_unet_conv_in.diff", 32, 4, 3, 3), ["conv_in.diff", "whole differences"]),
    "a difference of biases": (added(f"{NAME}.diff_b", 64), ["diff_b", "whole differences"]),
    "a pair with a bias": (
        peft(lambda tensors: tensors.update({f"{LAYER}.lora_B.bias": torch.ones(64)})), ["lora_B.bias", "biases"]
    ),
    "textual inversion": (alone("emb_params", 2, 64), ["emb_params", "textual inversion"]),
    "textual inversion besides": (added("bundle_emb.word.string_to_param.*", 2, 64), ["bundle_emb", "textual"]),
    "Control-LoRA": (added("lora_controlnet"), ["Control-LoRA"]),
    "peft's own spelling": (
        peft(lambda tensors: [tensors.update({f"base_model.model.{key}": tensors.pop(key)}) for key in list(tensors)]),
        ["base_model.model.", "save_lora_weights"],
    ),
    "a key of something else": (added("optimizer.step", 1), ["optimizer.step", "no part of a low-rank pair"]),
    "a layer that is not there": (pair("lora_unet_down_blocks_7_resnets_0_conv1", 8, 8), ["down_blocks_7", "no place"]),
    "a norm": (pair("lora_unet_conv_norm_out", 32, 32), ["conv_norm_out", "no place"]),
    "a table of words": (
        pair("lora_te_text_model_embeddings_token_embedding", 660, 64), ["token_embedding", "no place"]
    ),
    "SDXL by its second encoder": (
        pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 64, 64), ["lora_te2", "no place", "SDXL"]
    ),
    "SDXL by its depth": (pair(SDXL.replace("blocks_0_attn2", "blocks_3_attn2"), 64, 64), ["no place", "SDXL"]),
    "SDXL by the width of its texts": (pair(SDXL, 2048, 64), ["[64, 2048]", "[64, 64]", "SDXL"]),
    "SD2 by the width of its texts": (pair(SDXL, 1024, 64), [SDXL, "SD 2.x"]),
    "another SD1 model": (pair(SDXL, 768, 320), [SDXL, "[320, 768]", "SD 1.x"]),
    "Flux": (pair("lora_unet_double_blocks_0_img_attn_qkv", 64, 64), ["double_blocks", "diffusion transformer"]),
    "a model by its metadata": (
        pair("lora_unet_up_blocks_9_resnets_0_conv1", 64, 64, metadata={"ss_base_model_version": "sdxl_base_v1-0"}),
        ["no place", "sdxl_base_v1-0"],
    ),
    "up alone": (lora(lambda tensors: tensors.pop(DOWN)), [UP, "has no down"]),
    "down alone": (lora(lambda tensors: tensors.pop(UP)), [DOWN, "has no up"]),
    "alpha alone": (lora(lambda tensors: (tensors.pop(UP), tensors.pop(DOWN))), [ALPHA, "has no down"]),
    "two ranks": (
        lora(lambda tensors: tensors.update({UP: torch.ones(64, 4)})), [DOWN, "down [3, 64], up [64, 4]", "rank"]
    ),
    "no rank": (
        lora(lambda tensors: tensors.update({DOWN: torch.ones(0, 64), UP: torch.ones(64, 0)})), [DOWN, "[0, 64]"]
    ),
    "a vector": (lora(lambda tensors: tensors.update({DOWN: torch.ones(64)})), [DOWN, "[64]"]),
    "another output": (lora(lambda tensors: tensors.update({UP: torch.ones(32, 3)})), ["[32, 64]", "[64, 64]"]),
    "a kernel for a linear layer": (
        lora(lambda tensors: tensors.update({DOWN: torch.ones(3, 64, 3, 3), UP: torch.ones(64, 3, 1, 1)})),
        ["[64, 64, 3, 3]", "[64, 64]"],
    ),
    "no number": (spoilt(UP, float("nan")), [UP, "not finite"]),
    "an infinite number": (spoilt(DOWN, float("inf")), [DOWN, "not finite"]),
    "an alpha that is no number": (spoilt(ALPHA, float("nan")), [ALPHA, "not finite"]),
    "several alphas": (lora(lambda tensors: tensors.update({ALPHA: torch.ones(2)})), [ALPHA, "one number"]),
    "whole numbers": (
        lora(lambda tensors: tensors.update({UP: torch.ones(64, 3, dtype=torch.int8)})), [UP, "torch.int8"]
    ),
    "a layer by two names": (
        lora(
            lambda tensors: [
                tensors.update({key.replace("mid_block_attentions_0", "middle_block_1"): tensors[key].clone()})
                for key in list(tensors)
            ]
        ),
        ["middle_block_1", "mid_block_attentions_0", "two names"],
    ),
    "a part by two names": (
        lora(lambda tensors: tensors.update({f"{NAME}.lora_A.weight": torch.ones(3, 64)})), ["lora_A", "same part"]
    ),
    "a rank that the settings deny": (peft(nothing, r=8, lora_alpha=8), ["rank 3", "say 8"]),
    "an alpha that is text": (peft(nothing, r=3, lora_alpha="much"), ["lora_alpha", "much"]),
    "an infinite alpha": (peft(nothing, r=3, lora_alpha=10**400), ["lora_adapter_metadata"]),
    "a pattern of patterns": (peft(nothing, r=3, lora_alpha=3, alpha_pattern={"(a+)+": 1}), ["(a+)+", "no layer"]),
    "an initialisation that changes the model": (
        peft(nothing, r=3, lora_alpha=3, init_lora_weights="pissa"), ["init_lora_weights", "pissa"]
    ),
    "settings and alphas": (
        peft(lambda tensors: tensors.update({f"{LAYER}.alpha": torch.tensor(1.0)}), r=3, lora_alpha=3),
        [f"{LAYER}.alpha", "both"],
    ),
    "settings that are no JSON": (lora(nothing, {"lora_adapter_metadata": "{"}), ["lora_adapter_metadata", "JSON"]),
    "settings that are a list": (lora(nothing, {"lora_adapter_metadata": "[]"}), ["lora_adapter_metadata", "mapping"]),
    "the adapters of a flow student": (lora(nothing, {"sollune.prediction": "velocity"}), ["flow model"]),
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, inside what must not change."""
    (tmp_path / "home/sollune/teachers").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("name", TABLE)
def test_a_lora_that_does_not_fit_is_refused_by_file_and_key(name, refused, home):
    make, named = TABLE[name]
    file = make(home)
    words = [*caching(home / "run", TEACHER), "--teacher.loras", json.dumps([{"file": str(file)}])]
    refused(words, str(file), *named)


@pytest.mark.parametrize(
    ("scale", "named"),
    [("NaN", "scale"), ("Infinity", "scale"), ('"much"', "scale"), ("1e39", "smaller scale"), ("null", "scale")],
)
def test_a_scale_that_cannot_be_used_is_refused(scale, named, refused, home):
    file = lora(nothing)(home)
    text = f'[{{"file": "{file}", "scale": {scale}}}]'
    refused([*caching(home / "run", TEACHER), "--teacher.loras", text], named)


def test_the_second_of_two_files_is_refused_by_its_name(refused, home):
    good = lora(nothing)(home)
    (home / "other").mkdir()
    bad = added(f"{NAME}.dora_scale", 64, 1)(home / "other")
    text = json.dumps([{"file": str(good)}, {"file": str(bad), "scale": 0}])
    assert str(good) not in refused([*caching(home / "run", TEACHER), "--teacher.loras", text], str(bad), "DoRA")


def vae_file(change: Callable[[dict[str, Tensor]], object]) -> Make:
    def make(folder: Path) -> Path:
        tensors = load_file(TEACHER / "vae/diffusion_pytorch_model.safetensors")
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "vae.safetensors")
        return folder / "vae.safetensors"

    return make


VAES: dict[str, tuple[Make, list[str]]] = {
    "no file": (lambda folder: folder / "vae.safetensors", ["vae.safetensors"]),
    "an empty file": (content("vae.safetensors", b""), ["vae.safetensors", "is empty"]),
    "a folder of nothing": (lambda folder: folder, []),
    "a LoRA": (lora(nothing), ["style.safetensors", "LoRA"]),
    "a UNet": (
        lambda folder: made.write(
            load_file(TEACHER / "unet/diffusion_pytorch_model.safetensors"), folder / "unet.safetensors"
        ),
        ["unet.safetensors", "no autoencoder"],
    ),
    "one with a tensor less": (vae_file(lambda tensors: tensors.pop("decoder.conv_in.weight")), ["decoder.conv_in"]),
    "one of another shape": (
        vae_file(lambda tensors: tensors.update({"quant_conv.weight": torch.ones(32, 8, 1, 1)})), ["quant_conv.weight"]
    ),
    "one that is not finite": (
        vae_file(lambda tensors: tensors.update({"quant_conv.bias": tensors["quant_conv.bias"] * float("nan")})),
        ["vae.safetensors", "quant_conv.bias", "not finite"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
def test_what_is_no_autoencoder_of_these_latents_is_refused(name, refused, home):
    make, named = VAES[name]
    refused([*caching(home / "run", TEACHER), "--teacher.vae", str(make(home))], *named)


@pytest.mark.parametrize("skip", ["3", "4", "100", "-1", "1.5", "two"])
def test_a_clip_skip_that_leaves_no_layer_or_is_no_number_is_refused(skip, refused, home):
    refused([*caching(home / "run", TEACHER), "--teacher.clip-skip", skip], "clip", skip)
