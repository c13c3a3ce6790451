"""Mixes that do not fit their base, through the real command: each is refused by model and by what is wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import lora_files
from tests.cli.conftest import TEACHER
from tests.cli.test_broken_teachers import caching
from tests.fine_tunes import Tensors, change, fine_tune, setting, single
from tests.single_files import UNET, ldm_tensors, saved

Make = Callable[[Path], Path]
"""Writes the model of a row into a folder, in which the fine-tune `good` lies, and returns its path."""
SCHEDULE, WORDS = "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"
CONV_IN, EMBEDDING = "conv_in.weight", "text_model.embeddings.token_embedding.weight"


def folder(*changes: Callable[[Path], object]) -> Make:
    """A copy of the good fine-tune with something changed."""

    def make(place: Path) -> Path:
        model = Path(shutil.copytree(place / "good", place / "model"))
        for one in changes:
            one(model)
        return model

    return make


def weights(part: str, changed: Callable[[Tensors], Tensors]) -> Callable[[Path], object]:
    return lambda model: change(model, part, changed)


def with_value(part: str, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return weights(part, lambda held: {**held, name: value(held[name].float())})


def without(part: str, name: str) -> Callable[[Path], object]:
    return weights(part, lambda held: {key: value for key, value in held.items() if key != name})


def config(file: str, **values: Any) -> Callable[[Path], object]:
    return lambda model: setting(model, file, **values)


def vocabulary(changed: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Other tokens in all files of a tokenizer."""

    def broken(model: Path) -> None:
        content = json.loads((model / WORDS).read_text())
        changed(content["model"]["vocab"])
        (model / WORDS).write_text(json.dumps(content))
        (model / "tokenizer/vocab.json").write_text(json.dumps(content["model"]["vocab"]))

    return broken


def swap(vocab: dict[str, int]) -> None:
    one, other = sorted(vocab)[100:102]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def plain_tokenizer(model: Path) -> None:
    (model / WORDS).unlink()


def spoilt(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change_first(value: torch.Tensor) -> torch.Tensor:
        value.view(-1)[0] = number
        return value

    return change_first


def file(changed: Callable[[Tensors], object], metadata: dict[str, str] | None = None, name: str = "m") -> Make:
    """The good fine-tune as a single file with something changed in place."""

    def make(place: Path) -> Path:
        tensors = ldm_tensors(place / "good")
        changed(tensors)
        return saved(place / f"{name}.safetensors", tensors, metadata)

    return make


def content(name: str, data: bytes) -> Make:
    def make(place: Path) -> Path:
        (place / name).write_bytes(data)
        return place / name

    return make


def pipe(place: Path) -> Path:
    os.mkfifo(place / "m.safetensors")
    return place / "m.safetensors"


def lora(place: Path) -> Path:
    return lora_files.write(lora_files.kohya(lora_files.random_pairs("to_q")), place / "m.safetensors")


def narrower(held: Tensors) -> None:
    held[f"{UNET}input_blocks.0.0.weight"] = torch.ones(16, 4, 3, 3)


def one_more_word(held: Tensors) -> None:
    key = f"cond_stage_model.transformer.{EMBEDDING}"
    held[key] = torch.cat([held[key], held[key][:1]])


def other_table(held: Tensors) -> None:
    held["alphas_cumprod"] = torch.linspace(0.9, 0.1, 1000)


TABLE: dict[str, tuple[Make, list[str]]] = {
    "no folder": (lambda place: place / "none", ["none", "neither a folder nor a hub"]),
    "no file": (lambda place: place / "m.safetensors", ["m.safetensors", "no such file"]),
    "an empty folder": (lambda place: (place / "m").mkdir() or place / "m", ["model_index.json", "missing"]),
    "an empty file": (content("m.safetensors", b""), ["mix: ", "is empty"]),
    "a page of the web": (content("m.ckpt", b"<!DOCTYPE html>"), ["mix: ", "m.ckpt"]),
    "a pointer": (content("m.safetensors", b"version https://git-lfs.github.com/1"), ["git lfs pull"]),
    "a pipe": (pipe, ["m.safetensors", "a pipe"]),
    "a LoRA": (lora, ["mix: ", "a LoRA", "--teacher.loras"]),
    "an autoencoder alone": (lambda place: single(place / "good", place / "m.safetensors", "vae"), ["without a UNet"]),
    "an export": (file(lambda held: None, {"sollune.prediction": "velocity"}), ["velocity model"]),
    "a file of v by its marker": (
        file(lambda held: held.update({"v_pred": torch.zeros(0)})), ["prediction_type v_prediction", "epsilon"]
    ),
    "a file of v by its metadata": (
        file(lambda held: None, {"modelspec.prediction_type": "v"}), ["prediction_type v_prediction", "epsilon"]
    ),
    "a file without signal at its end": (
        file(lambda held: held.update({"ztsnr": torch.zeros(0)})), ["zero_terminal_snr True", "False"]
    ),
    "a file of another schedule": (file(other_table), ["mix: ", "alphas_cumprod", "leave this one out"]),
    "a file of another width": (file(narrower), ["mix: ", "conv_in.weight", "[16, 4, 3, 3]", "leave this one out"]),
    "a file of one word more": (file(one_more_word), ["mix: ", EMBEDDING, "[661, 64]", "leave this one out"]),
    "a file of a tensor less": (
        file(lambda held: held.pop(f"{UNET}out.2.bias")), ["mix: ", "conv_out.bias", "leave this one out"]
    ),
    "a file that is not finite": (
        file(lambda held: held.update({f"{UNET}out.2.bias": torch.full((4,), float("nan"))})),
        ["mix: ", "m.safetensors", "conv_out.bias", "not finite"],
    ),
    "a folder of v": (folder(config(SCHEDULE, prediction_type="v_prediction")), ["v_prediction", "epsilon", "repair"]),
    "a folder of velocity": (folder(config(SCHEDULE, prediction_type="flow_prediction")), ["flow_prediction"]),
    "a folder without signal at its end": (
        folder(config(SCHEDULE, prediction_type="epsilon", rescale_betas_zero_snr=True)), ["zero_terminal_snr True"]
    ),
    "a folder of other betas": (folder(config(SCHEDULE, beta_end=0.02)), ["alphas_cumprod", "not that of the base"]),
    "a folder of fewer steps": (folder(config(SCHEDULE, num_train_timesteps=500)), ["500 steps"]),
    "a folder of broken betas": (folder(config(SCHEDULE, beta_schedule="none")), ["beta_schedule"]),
    "SDXL by its index": (
        folder(config("model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])),
        ["CLIPTextModelWithProjection"],
    ),
    "an inpainting folder": (folder(config("unet/config.json", in_channels=9)), ["in_channels is 9"]),
    "a folder of another width": (
        folder(with_value("unet", CONV_IN, lambda value: value[:16])), ["mix: ", "unet", CONV_IN, "[16, 4, 3, 3]"]
    ),
    "a folder of a tensor less": (
        folder(without("text_encoder", EMBEDDING)), ["mix: ", "text_encoder", EMBEDDING, "not there"]
    ),
    "a folder of a tensor more": (
        folder(weights("unet", lambda held: {**held, "extra.weight": torch.ones(2)})), ["extra.weight", "not in the"]
    ),
    "a folder of integers": (
        folder(weights("unet", lambda held: {**held, CONV_IN: held[CONV_IN].to(torch.int8)})), [CONV_IN, "I8"]
    ),
    "other heads": (folder(config("unet/config.json", attention_head_dim=2)), ["attention_head_dim is 2", "the base"]),
    "other heads of texts": (folder(config("text_encoder/config.json", num_attention_heads=2)), ["heads is 2"]),
    "another function": (folder(config("text_encoder/config.json", hidden_act="gelu")), ["hidden_act is gelu"]),
    "a tokenizer with a word more": (
        folder(vocabulary(lambda vocab: vocab.update({"newword</w>": 660}))), ["1 token,", "newword</w>", "UNet alone"]
    ),
    "a tokenizer with two words exchanged": (folder(vocabulary(swap)), ["2 tokens", "UNet alone"]),
    "the same in the older files": (folder(vocabulary(swap), plain_tokenizer), ["2 tokens", "UNet alone"]),
    "a tokenizer without words": (folder(config(WORDS, model={})), ["tokenizer.json", "no tokens"]),
    "a folder that is not finite": (
        folder(with_value("text_encoder", EMBEDDING, spoilt(float("inf")))), ["mix: ", EMBEDDING, "not finite"]
    ),
    "a folder of huge weights": (folder(with_value("unet", CONV_IN, spoilt(1e30))), ["mix: ", CONV_IN, "1e+30"]),
    "the same again": (lambda place: place / "good", ["good", "comes twice"]),
    "the same by another path": (lambda place: place / "x/../good", ["comes twice"]),
    "a copy of the same": (folder(), ["model", "good", "comes twice"]),
    "the same as a single file": (lambda place: single(place / "good", place / "m.ckpt"), ["m.ckpt", "comes twice"]),
    "the same in half precision": (
        folder(*(weights(part, lambda held: {key: v.half() for key, v in held.items()})
                 for part in ("unet", "text_encoder"))),
        ["comes twice"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tune(tmp_path_factory.mktemp("models") / "good", 3)


@pytest.fixture
def home(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache and a good fine-tune, inside what must not change."""
    (tmp_path / "home/sollune/teachers").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    shutil.copytree(good, tmp_path / "good")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def mixing(home: Path, *entries: tuple[object, object]) -> list[str]:
    text = json.dumps([{"model": str(model), "weight": weight} for model, weight in entries])
    return [*caching(home / "run", TEACHER), "--teacher.mix", text]


@pytest.mark.parametrize("name", TABLE)
def test_a_model_that_does_not_fit_beside_a_good_one_is_refused(name, refused, home):
    make, named = TABLE[name]
    refused(mixing(home, (home / "good", 0.6), (make(home), 0.4)), *named)


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (float("nan"), ["weight", "finite"]),
        (float("inf"), ["weight", "finite"]),
        (10**400, ["--teacher.mix", "a number of more than 100 digits"]),
        (0, ["weight", "other number than 0", "leave the model out"]),
        (-0.0, ["weight", "leave the model out"]),
        ("much", ["weight", "much"]),
        (None, ["weight"]),
        (1e9, ["1e+09", "nearer to 1"]),
        (-1e300, ["-1e+300", "nearer to 1"]),
    ],
)
def test_a_weight_that_cannot_be_used_is_refused(weight, named, refused, home):
    refused(mixing(home, (home / "good", weight)), *named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('["good"]', ["mix.0", "weight: 0.5"]),
        ('[{"model": "good"}]', ["mix.0.weight", "required"]),
        ('[{"weight": 1}]', ["mix.0.model", "required"]),
        ('[{"model": " ", "weight": 1}]', ["mix.0.model"]),
        ('[{"model": "good", "weight": 1, "part": "unet"}]', ["part", "unknown key"]),
        ('{"model": "good", "weight": 1}', ["mix"]),
        ("good", ["mix"]),
    ],
)
def test_an_entry_that_is_no_model_with_a_weight_is_refused(text, named, refused, home):
    refused([*caching(home / "run", TEACHER), "--teacher.mix", text], *named)


def test_the_doctor_refuses_it_too_and_says_of_a_mix_what_it_is_made_of(refused, home, capsys, good):
    from stages import __main__ as cli

    refused(["doctor", str(TEACHER), "--teacher.mix", f'[{{"model": "{home}/none", "weight": 1}}]'], "mix: ", "none")
    assert cli.main(["doctor", str(TEACHER), "--teacher.mix", f'[{{"model": "{home}/good", "weight": 0.5}}]']) == 0
    page = capsys.readouterr().out
    assert f"mix {home}/good times 0.5" in page
    assert "distance 0.05" in page
    assert "mix 1 unet" in page
