"""Laws of loading a teacher: every way in which a whole model is stored gives the same parts."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.nets.components import Components, load_components
from stages.nets.loading import align_weights, load_component, load_tokenizer
from stages.teacher_files.folder import component_digests

MODEL = Path("stages/tiny/model")
CPU = torch.device("cpu")
SENTENCES = ["A small RED star, at the left!", "two blue moons & 13 rings", ""]
SD15_TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": {
        "__type": "AddedToken",
        "content": "<|startoftext|>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    },
    "do_lower_case": True,
    "eos_token": {
        "__type": "AddedToken",
        "content": "<|endoftext|>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    },
    "errors": "replace",
    "model_max_length": 24,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": "<|endoftext|>",
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {
        "__type": "AddedToken",
        "content": "<|endoftext|>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    },
}
"""The settings of Stable Diffusion 1.5's own tokenizer, but for the length."""


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "teacher"))


def stored(teacher: Path, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
    name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
    save_file(dict(tensors), teacher / part / name, {"format": "pt"})


def same(folder: Path, part: str) -> bool:
    one, other = (load_component(place, part, torch.float32).state_dict() for place in (folder, MODEL))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("position_ids", [True, False])
def test_a_text_encoder_loads_under_the_names_of_every_version(teacher: Path, flat: bool, position_ids: bool) -> None:
    held = load_file(MODEL / "text_encoder/model.safetensors")
    if position_ids:
        held["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    stored(teacher, "text_encoder", {name.removeprefix("text_model.") if flat else name: v for name, v in held.items()})
    assert same(teacher, "text_encoder")


def test_an_autoencoder_loads_under_the_names_of_before_its_attention_was_renamed(teacher: Path) -> None:
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def name_of(name: str) -> str:
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    held = load_file(MODEL / "vae/diffusion_pytorch_model.safetensors")
    stored(teacher, "vae", {name_of(name): value for name, value in held.items()})
    assert same(teacher, "vae")


def test_weights_in_half_precision_load(teacher: Path) -> None:
    held = load_file(MODEL / "unet/diffusion_pytorch_model.safetensors")
    stored(teacher, "unet", {name: value.half() for name, value in held.items()})
    assert load_component(teacher, "unet", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kept", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_a_tokenizer_loads_from_either_kind_of_file(teacher: Path, kept: tuple[str, ...]) -> None:
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - set(kept):
        (teacher / "tokenizer" / name).unlink()
    one, other = load_tokenizer(teacher), load_tokenizer(MODEL)
    assert one(SENTENCES).input_ids == other(SENTENCES).input_ids


def test_stable_diffusions_own_tokenizer_files_load(teacher: Path) -> None:
    """No tokenizer.json, special tokens in a file of their own, and ids outside of the text encoder's vocabulary."""
    (teacher / "tokenizer/tokenizer.json").unlink()
    (teacher / "tokenizer/tokenizer_config.json").write_text(json.dumps(SD15_TOKENIZER))
    tokens = {key: SD15_TOKENIZER[key] for key in ("bos_token", "eos_token", "unk_token")}
    special = {key: {k: v for k, v in dict(token).items() if k != "__type"} for key, token in tokens.items()}  # type: ignore[call-overload]
    path = teacher / "tokenizer/special_tokens_map.json"
    path.write_text(json.dumps({**special, "pad_token": "<|endoftext|>"}))
    config = teacher / "text_encoder/config.json"
    legacy = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config.write_text(json.dumps({**json.loads(config.read_text()), **legacy}))
    one, other = load_tokenizer(teacher), load_tokenizer(MODEL)
    padded = {"padding": "max_length", "truncation": True}
    assert one(SENTENCES, **padded).input_ids == other(SENTENCES, **padded).input_ids
    before = component_digests(teacher)
    path.write_text(path.read_text() + "\n")
    assert component_digests(teacher)["tokenizer"] != before["tokenizer"]


def named(location: str) -> dict[str, str]:
    parts: Components = load_components(location, CPU, torch.float32)
    return parts.name_facts


@pytest.mark.parametrize("location", [".", "./", "../teacher", "../teacher/", "../link", "inner/.."])
def test_a_teacher_is_named_by_its_folder_however_that_is_written(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    (teacher / "inner").mkdir()
    (teacher.parent / "link").symlink_to(teacher)
    monkeypatch.chdir(teacher)
    assert named(location) == {"teacher": "teacher"}


def test_weights_that_a_file_holds_in_fp32_are_moved_to_where_every_processor_rounds_alike(teacher: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        whole = load_component(teacher, part, torch.float32)
        stored(teacher, part, {name: value.clone() for name, value in whole.state_dict().items()})
        read = load_component(teacher, part, torch.float32)
        assert {tensor.data_ptr() % 64 for tensor in (*read.parameters(), *read.buffers())} == {0}
        assert read.state_dict().keys() == whole.state_dict().keys()
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in read.state_dict().items())


def test_unaligned_tensors_are_copied_and_others_stay() -> None:
    layer = torch.nn.Linear(4, 4)
    weight, bias = torch.randn(17)[1:].view(4, 4), layer.bias.data_ptr()
    layer.weight.data = weight
    assert layer.weight.data_ptr() % 64
    align_weights(layer)
    assert layer.weight.data_ptr() % 64 == 0
    assert torch.equal(layer.weight, weight)
    assert layer.bias.data_ptr() == bias
