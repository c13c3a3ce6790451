"""Teachers that are not whole, tried through the real commands: each is refused in one line by part and name."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import __main__ as cli
from stages.teacher_files.folder import WEIGHT_FILES

Break = Callable[[Path], object]
Q_PROJ = "text_model.encoder.layers.1.self_attn.q_proj.weight"
CONV_IN = "conv_in.weight"


def weights_of(teacher: Path, part: str) -> Path:
    return teacher / part / WEIGHT_FILES[part][0]


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Break:
    """Other tensors in the file of a part."""

    def broken(teacher: Path) -> None:
        file = weights_of(teacher, part)
        save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file, {"format": "pt"})

    return broken


def without(part: str, name: str) -> Break:
    return tensors(part, lambda held: {key: value for key, value in held.items() if key != name})


def instead(part: str, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    return tensors(part, lambda held: {**held, name: value(held[name])})


def renamed(part: str) -> Break:
    return tensors(part, lambda held: {f"model.{key}": value for key, value in held.items()})


def spoilt(part: str, name: str, number: float) -> Break:
    def spoil(value: torch.Tensor) -> torch.Tensor:
        value = value.float()
        value.view(-1)[0] = number
        return value

    return instead(part, name, spoil)


def setting(file: str, **values: Any) -> Break:
    """Other values in a config; `...` takes the entry out."""

    def broken(teacher: Path) -> None:
        path = teacher / file
        merged = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))

    return broken


def content(file: str, text: str | bytes) -> Break:
    return lambda teacher: (teacher / file).write_bytes(text.encode() if isinstance(text, str) else text)


def cut(part: str) -> Break:
    return lambda teacher: weights_of(teacher, part).write_bytes(weights_of(teacher, part).read_bytes()[:-100])


def removed(*names: str) -> Break:
    return lambda teacher: [(teacher / name).unlink() for name in names]


def only_settings(teacher: Path) -> None:
    """A tokenizer of which its settings alone are left."""
    removed("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt")(teacher)


def no_merges(teacher: Path) -> None:
    """A tokenizer whose merges are lost: every word falls into letters."""
    removed("tokenizer/tokenizer.json")(teacher)
    (teacher / "tokenizer/merges.txt").write_text("#version: 0.2\n")


def no_words(teacher: Path) -> None:
    """A tokenizer.json of special tokens alone, as transformers itself makes one of nothing."""
    removed("tokenizer/vocab.json", "tokenizer/merges.txt")(teacher)
    path = teacher / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = []
    tokenizer["model"]["vocab"] = {
        word: number for word, number in tokenizer["model"]["vocab"].items() if number >= 658
    }
    path.write_text(json.dumps(tokenizer))


def other_words(teacher: Path) -> None:
    """A vocab.json that other programs would read, and that is not the tokenizer.json that was read."""
    path = teacher / "tokenizer/vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({**vocabulary, "red</w>": vocabulary["blue</w>"], "blue</w>": vocabulary["red</w>"]}))


def lost_shard(teacher: Path) -> None:
    file = weights_of(teacher, "unet")
    index = {"metadata": {}, "weight_map": {CONV_IN: "one.safetensors", "conv_out.bias": "two.safetensors"}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.rename(file.with_name("one.safetensors"))


def pickled(teacher: Path) -> None:
    """Old weights, of which one is missing."""
    file = weights_of(teacher, "unet")
    held = load_file(file)
    del held[CONV_IN]
    torch.save(held, file.with_suffix(".bin"))
    file.unlink()


def vast(value: torch.Tensor) -> torch.Tensor:
    return torch.full(value.shape, 1e300, dtype=torch.float64)


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENS = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"

TABLE: dict[str, tuple[Break, list[str]]] = {
    "text encoder without a tensor": (without("text_encoder", Q_PROJ), ["text_encoder", "missing", "q_proj.weight"]),
    "text encoder of other names": (renamed("text_encoder"), ["text_encoder", "52 tensors missing", "unknown"]),
    "unet without a tensor": (without("unet", CONV_IN), ["unet", "1 tensor missing", CONV_IN]),
    "vae without a tensor": (without("vae", "quant_conv.bias"), ["vae", "missing", "quant_conv.bias"]),
    "unet of other names": (renamed("unet"), ["unet", "missing", "unknown", "model."]),
    "text encoder with an unknown tensor": (
        tensors("text_encoder", lambda held: {**held, "visual.proj": torch.zeros(3)}),
        ["text_encoder", "1 tensor unknown", "visual.proj"],
    ),
    "vae with an unknown tensor": (
        tensors("vae", lambda held: {**held, "loss.logvar": torch.zeros(3)}),
        ["vae", "unknown", "loss.logvar"],
    ),
    "text encoder of another shape": (
        instead("text_encoder", Q_PROJ, lambda value: value[:3]),
        ["text_encoder", "of another shape", "q_proj.weight", "[3, 64]", "[64, 64]"],
    ),
    "unet of another shape": (
        instead("unet", CONV_IN, lambda value: value[:, :2]),
        ["unet", "of another shape", CONV_IN, "[32, 2, 3, 3]"],
    ),
    "text encoder with fewer layers": (setting(TEXT, num_hidden_layers=2), ["text_encoder", "unknown", "layers.2"]),
    "unet with more layers": (setting(UNET, layers_per_block=2), ["unet", "missing", "resnets.1"]),
    "whole numbers for weights": (instead("vae", "quant_conv.bias", torch.Tensor.int), ["quant_conv.bias", "I32"]),
    "a weight that is no number": (spoilt("unet", CONV_IN, float("nan")), ["unet", CONV_IN, "not finite"]),
    "an infinite weight": (spoilt("vae", "quant_conv.bias", float("inf")), ["vae", "quant_conv.bias", "not finite"]),
    "a text encoder's weight that is no number": (
        spoilt("text_encoder", Q_PROJ, float("nan")),
        ["text_encoder", "q_proj.weight", "not finite"],
    ),
    "a weight too large for float32": (instead("vae", "quant_conv.bias", vast), ["vae", "quant_conv.bias", "finite"]),
    "weights too large to compute with": (
        instead("text_encoder", Q_PROJ, lambda value: value.float().sign() * 3e38),
        ["text_encoder", "answer is not finite"],
    ),
    "an unet too large to compute with": (
        instead("unet", CONV_IN, lambda value: value.float() * 1e37),
        ["unet", "answer is not finite"],
    ),
    "groups of nothing": (setting(VAE, norm_num_groups=-1), ["vae", "cannot be used", "num groups"]),
    "a rounding that is a list": (setting(UNET, norm_eps=[]), ["unet", "norm_eps is []"]),
    "a cut file": (cut("vae"), ["vae", "not a whole safetensors file"]),
    "an empty file": (content("unet/diffusion_pytorch_model.safetensors", b""), ["unet", "is empty"]),
    "a pointer of Git LFS": (content("text_encoder/model.safetensors", POINTER), ["text_encoder", "git lfs pull"]),
    "a page of HTML": (content("text_encoder/model.safetensors", "<html>404</html>"), ["model.safetensors"]),
    "no weights": (removed("text_encoder/model.safetensors"), ["text_encoder", "no weights", "model.safetensors"]),
    "a lost shard": (lost_shard, ["two.safetensors", "is missing"]),
    "pickled weights without a tensor": (pickled, ["unet", "missing", CONV_IN]),
    "pickled text": (
        lambda teacher: (
            (teacher / "text_encoder/pytorch_model.bin").write_text("cos\nsystem\n"),
            removed("text_encoder/model.safetensors")(teacher),
        ),
        ["text_encoder", "cannot be used"],
    ),
    "tokenizer with its settings alone": (only_settings, ["tokenizer", "has no words"]),
    "tokenizer of special tokens": (no_words, ["tokenizer", "tokens = 2", "vocab_size is 660"]),
    "tokenizer without merges": (no_merges, ["tokenizer", "never made by a merge"]),
    "tokenizer of half a file": (content("tokenizer/tokenizer.json", '{"version": "1.0"'), ["tokenizer"]),
    "tokenizer in two versions": (other_words, ["tokenizer", "vocab.json"]),
    "tokenizer without a length": (setting(TOKENS, model_max_length=...), ["model_max_length", "24"]),
    "tokenizer of another length": (setting(TOKENS, model_max_length=77), ["model_max_length = 77", "24"]),
    "tokenizer with a foreign end": (setting(TOKENS, eos_token="<eos>"), ["tokenizer"]),
    "tokenizer whose end is another's": (setting(TEXT, eos_token_id=600), ["eos_token_id is 659", "600"]),
    "text encoder of fewer words": (setting(TEXT, vocab_size=600), ["tokens = 660", "vocab_size is 600"]),
    "linear projections": (setting(UNET, use_linear_projection=True), ["unet", "use_linear_projection is True"]),
    "a wider cross attention": (setting(UNET, cross_attention_dim=1024), ["cross_attention_dim is 1024", "64"]),
    "heads of each block": (setting(UNET, attention_head_dim=[5, 10, 20, 20]), ["attention_head_dim", "[5, 10"]),
    "an added embedding": (setting(UNET, addition_embed_type="text_time"), ["addition_embed_type is text_time"]),
    "embedded guidance": (setting(UNET, time_cond_proj_dim=256), ["time_cond_proj_dim is 256"]),
    "class embeddings": (setting(UNET, num_class_embeds=1000), ["num_class_embeds is 1000"]),
    "no size": (setting(UNET, sample_size=...), ["sample_size is None"]),
    "two sizes": (setting(UNET, sample_size=[8, 8]), ["sample_size is [8, 8]"]),
    "a size in words": (setting(UNET, sample_size="8"), ["sample_size"]),
    "latents of another width": (setting(VAE, latent_channels=16), ["vae", "latent_channels is 16"]),
    "no scale": (setting(VAE, scaling_factor=0), ["vae", "scaling_factor is 0"]),
    "a shift of the latents": (setting(VAE, shift_factor=0.1), ["vae", "shift_factor is 0.1"]),
    "layers beyond all memory": (setting(UNET, layers_per_block=10**9), ["layers_per_block is 1000000000"]),
    "a config that is a list": (content(UNET, "[]"), ["unet/config.json", "list"]),
    "a config that is no JSON": (content(VAE, "{"), ["vae/config.json", "not JSON"]),
    "a config of UTF-16": (content(TEXT, "{}".encode("utf-16")), ["text_encoder/config.json", "not JSON"]),
    "a config that is a folder": (
        lambda teacher: ((teacher / VAE).unlink(), (teacher / VAE).mkdir()),
        ["vae/config.json", "a folder"],
    ),
    "a config without a number": (content(VAE, '{"scaling_factor": NaN}'), ["vae/config.json", "NaN"]),
    "an index of another model": (setting("model_index.json", unet=["diffusers", "UNet3D"]), ["unet is UNet3D"]),
    "an index of words": (setting("model_index.json", vae="AutoencoderKL2"), ["vae is AutoencoderKL2"]),
    "a schedule of one step": (setting(SCHEDULER, num_train_timesteps=1), ["num_train_timesteps is 1"]),
    "a schedule of half a step": (setting(SCHEDULER, num_train_timesteps=True), ["num_train_timesteps is True"]),
    "a schedule beyond all memory": (setting(SCHEDULER, num_train_timesteps=10**12), ["num_train_timesteps"]),
    "a schedule of words": (
        setting(SCHEDULER, num_train_timesteps=3, trained_betas=["a", "b", "c"]),
        ["trained_betas"],
    ),
    "a list of schedules": (setting(SCHEDULER, beta_schedule=["linear"]), ["beta_schedule"]),
    "a schedule of a teacher that predicts the picture": (
        setting(SCHEDULER, prediction_type="sample"),
        ["prediction_type"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_broken_teacher_is_refused_before_anything_is_cached(name, teacher, refused, tmp_path):
    broken, named = TABLE[name]
    broken(teacher)
    refused(caching(tmp_path / "run", teacher), *named)


def test_an_unknown_tail_is_refused_with_those_that_are_left(teacher, refused, tmp_path):
    refused([*caching(tmp_path / "run", teacher), "--render.tail", "data"], "render.tail", "data", "hold", "faithful")


def test_weights_that_half_precision_cannot_hold_are_refused(teacher, refused, tmp_path):
    spoilt("unet", CONV_IN, 1e6)(teacher)
    refused([*caching(tmp_path / "run", teacher), "--dtype", "float16"], "unet", CONV_IN, "too large for float16")


@pytest.mark.parametrize(
    "name", ["text encoder without a tensor", "a weight that is no number", "tokenizer with its settings alone"]
)
def test_a_broken_teacher_is_refused_by_whatever_opens_it(name, teacher, refused, tmp_path):
    broken, named = TABLE[name]
    broken(teacher)
    refused(["sample", str(teacher), "a red star", "--out", str(tmp_path / "x.png")], *named)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small cache, and its teacher beside it."""
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree("stages/tiny/model", folder / "teacher")
    assert cli.main(caching(folder / "run", folder / "teacher")) == 0
    return folder


@pytest.fixture
def own(cached: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may break; the manifest goes on naming the first place."""
    return Path(shutil.copytree(cached, tmp_path / "own"))


@pytest.mark.parametrize("name", ["text encoder of other names", "vae without a tensor", "a cut file", "no weights"])
def test_a_teacher_that_broke_since_is_refused_by_distill(name, own, refused):
    TABLE[name][0](own / "teacher")
    words = ["distill", "--config", "configs/tiny.yaml", "--run", str(own / "run")]
    refused([*words, "--teacher", str(own / "teacher")], str(own / "teacher"))


def test_a_teacher_that_moved_is_refused_with_the_option_for_its_place(own, cached, refused):
    shutil.rmtree(own / "teacher")
    hidden = cached / "hidden"
    (cached / "teacher").rename(hidden)
    words = ["distill", "--config", "configs/tiny.yaml", "--run", str(own / "run")]
    try:
        refused(words, str(cached / "teacher"), "--teacher")
    finally:
        hidden.rename(cached / "teacher")


@pytest.mark.parametrize("words", [["--count", "12"], []])
def test_a_cache_is_not_gone_on_with_by_another_teacher(own, refused, words):
    instead("unet", CONV_IN, lambda value: 1.5 * value)(own / "teacher")
    refused([*caching(own / "run", own / "teacher"), *words], "teacher.unet", "another recipe")


def caching(run: Path, teacher: Path) -> list[str]:
    words = ["cache-teacher", "--config", "configs/tiny.yaml", "--run", str(run), "--teacher", str(teacher)]
    few = ["--count", "4", "--validation-count", "2", "--render.records-per-shard", "2", "--render.states.steps", "4"]
    return [*words, *few]
