"""LoRA files of every naming, merged as stock diffusers merges them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from stages.system.refusal import Refused
from stages.teacher_files.lora import LoraMerge, open_loras
from stages.teacher_files.lora.names import layer_spellings
from stages.teacher_files.source import LoraFile
from tests import lora_files as made

TOLERANCE = 1e-5
ATTENTION = made.random_pairs(*made.ATTENTION, "q_proj", "k_proj", "v_proj", "out_proj")
LINEAR = made.random_pairs(*made.ATTENTION, *made.OTHER_LINEAR, *made.TEXT_LAYERS, seed=1)
ALL = made.random_pairs(*made.ATTENTION, *made.OTHER_LINEAR, *made.CONVOLUTIONS, *made.TEXT_LAYERS, seed=2)
UNET = {layer: pair for layer, pair in ALL.items() if layer.startswith("unet.")}
NAMINGS: dict[str, tuple[made.Tensors, dict[str, Any]]] = {
    "kohya": (made.kohya(ALL), {}),
    "kohya without alpha": (made.kohya(ALL, alpha=None), {}),
    "kohya with te1": (made.kohya(LINEAR, text_prefix="lora_te1"), {}),
    "kohya with the blocks of LDM": (made.kohya_ldm(ATTENTION), {"unet_config": None}),
    "peft": (made.peft(ALL), {}),
    "diffusers": (made.diffusers(LINEAR), {}),
    "diffusers' attention processors": (made.old_diffusers(ATTENTION), {}),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return made.embedded_weights()


def merge(weights: dict[str, Tensor], *loras: LoraFile) -> LoraMerge:
    return open_loras(loras, {key: value.shape for key, value in weights.items()}, layers_per_block=1)


def merged(weights: dict[str, Tensor], *loras: LoraFile) -> dict[str, Tensor]:
    changes = merge(weights, *loras)
    return {key: changes.merged(key, value) for key, value in weights.items()}


def stock(file: Path, scale: float, **options: Any) -> dict[str, Tensor]:
    """The weights of the stock pipeline with a file merged into it."""
    pipeline = StableDiffusionPipeline.from_pretrained(made.TEACHER)
    if "unet_config" in options:
        options["unet_config"] = pipeline.unet.config
    pipeline.load_lora_weights(file.parent, weight_name=file.name, **options)
    pipeline.fuse_lora(components=["unet", "text_encoder"], lora_scale=scale)
    pipeline.unload_lora_weights()
    return by_name(pipeline)


def by_name(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    text = {f"text_encoder.text_model.{key}": value for key, value in pipeline.text_encoder.state_dict().items()}
    return {f"unet.{key}": value for key, value in pipeline.unet.state_dict().items()} | text


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_file_of_each_naming_is_merged_as_stock_diffusers_merges_it(
    naming: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors, options = NAMINGS[naming]
    file = made.write(tensors, tmp_path / "style.safetensors")
    ours, theirs = merged(weights, LoraFile(file=str(file), scale=0.7)), stock(file, 0.7, **options)
    assert largest_difference(ours, theirs) <= TOLERANCE
    changed = {key for key in weights if not torch.equal(ours[key], weights[key])}
    assert {key.partition(".")[0] for key in changed} == {"unet", "text_encoder"}
    assert len(changed) == sum(key.endswith(("down.weight", "lora_A.weight")) for key in tensors)


def test_names_without_a_prefix_are_the_unets(weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = made.write(made.peft_without_prefix(UNET), tmp_path / "unet.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(made.TEACHER)
    pipeline.unet.load_lora_adapter(str(tmp_path), prefix=None, weight_name=file.name)
    pipeline.unet.fuse_lora(lora_scale=-0.4)
    pipeline.unet.unload_lora()
    ours = merged(weights, LoraFile(file=str(file), scale=-0.4))
    assert largest_difference(ours, by_name(pipeline)) <= TOLERANCE


def test_the_settings_in_the_metadata_count_as_in_stock_diffusers(weights: dict[str, Tensor], tmp_path: Path) -> None:
    few = {layer: (down[:2], up[:, :2]) if ".attn2." in layer else (down, up) for layer, (down, up) in ALL.items()}
    metadata: dict[str, Any] = {}
    for part in ("unet", "text_encoder"):
        layers = [layer.partition(".")[2] for layer in few if layer.startswith(f"{part}.")]
        ranks = {f"^{layer}": 2 for layer in layers if ".attn2." in layer}
        alphas = {"to_q": 7.5, "mid_block.resnets.0.conv1": 5} if part == "unet" else {"fc1": 0.5}
        values = {"r": 3, "lora_alpha": 4, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": part == "unet"}
        values |= {"target_modules": [layer.removeprefix("text_model.") for layer in layers], "init_lora_weights": True}
        metadata |= {f"{part}.{key}": value for key, value in values.items()}
    file = made.write(made.peft(few), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    ours, theirs = merged(weights, LoraFile(file=str(file), scale=0.5)), stock(file, 0.5)
    assert largest_difference(ours, theirs) <= TOLERANCE
    plain = merged(weights, LoraFile(file=str(made.write(made.peft(few), tmp_path / "b.safetensors")), scale=0.5))
    assert largest_difference(ours, plain) > 100 * TOLERANCE


def test_what_diffusers_saves_of_its_own_adapters_counts_as_they_did(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig as PeftConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(made.TEACHER)
    unet, text = pipeline.unet, pipeline.text_encoder
    unet.add_adapter(PeftConfig(r=2, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False))
    text.add_adapter(PeftConfig(r=3, lora_alpha=1, target_modules=["k_proj", "fc2"], init_lora_weights=False))
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(text, adapter_name="default"),
        **_collate_lora_metadata({"unet": unet, "text_encoder": text}),
    )
    pipeline.fuse_lora(components=["unet", "text_encoder"])
    pipeline.unload_lora_weights()
    ours = merged(weights, LoraFile(file=str(tmp_path / "pytorch_lora_weights.safetensors")))
    assert largest_difference(ours, by_name(pipeline)) <= TOLERANCE
    assert largest_difference(ours, weights) > 100 * TOLERANCE


def test_each_layer_has_its_own_alpha_and_rank(weights: dict[str, Tensor], tmp_path: Path) -> None:
    one, other = (f"unet.mid_block.resnets.{j}.conv1" for j in range(2))
    text = "text_encoder.text_model.encoder.layers.2.mlp.fc1"
    wide, thin = made.random_pairs("conv1", "fc1", rank=4), made.random_pairs("conv1", "fc1", rank=1)
    tensors = (
        made.kohya({one: wide[one]}, 1.0) | made.kohya({other: thin[other]}, 6.0) | made.kohya({text: wide[text]}, 2.0)
    )
    ours = merged(weights, LoraFile(file=str(made.write(tensors, tmp_path / "a.safetensors")), scale=2.0))
    for layer, pairs, factor in ((one, wide, 2 * 1 / 4), (other, thin, 2 * 6 / 1), (text, wide, 2 * 2 / 4)):
        down, up = pairs[layer]
        key = f"{layer}.weight"
        expected = weights[key] + factor * (up.flatten(1) @ down.flatten(1)).reshape(weights[key].shape)
        assert torch.allclose(ours[key], expected, atol=TOLERANCE)


def test_a_kernel_between_two_1x1_convolutions_is_tuckers_decomposition(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    layer = "unet.down_blocks.0.resnets.0.conv2"
    weight = weights[f"{layer}.weight"]
    generator = torch.Generator().manual_seed(3)
    up, mid, down = (
        torch.randn(shape, generator=generator)
        for shape in ((weight.shape[0], 3, 1, 1), (3, 3, 3, 3), (3, weight.shape[1], 1, 1))
    )
    tensors = made.kohya({layer: (down, up)}, 1.5)
    tensors["lora_unet_down_blocks_0_resnets_0_conv2.lora_mid.weight"] = mid
    ours = merged(weights, LoraFile(file=str(made.write(tensors, tmp_path / "a.safetensors"))))
    x = torch.randn(2, weight.shape[1], 6, 5, generator=generator)
    through = torch.nn.functional.conv2d(x, down)
    through = torch.nn.functional.conv2d(torch.nn.functional.conv2d(through, mid, padding=1), up)
    added = torch.nn.functional.conv2d(x, ours[f"{layer}.weight"] - weight, padding=1)
    assert torch.allclose(added, 0.5 * through, atol=1e-3)


def test_a_matrix_between_two_matrices_is_the_same_for_a_linear_layer(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    down, up = made.random_pairs("fc1")[layer]
    mid = torch.randn(3, 3, generator=torch.Generator().manual_seed(4))
    tensors = made.kohya({layer: (down, up)}, None)
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_mid.weight"] = mid
    ours = merged(weights, LoraFile(file=str(made.write(tensors, tmp_path / "a.safetensors"))))
    assert torch.allclose(ours[f"{layer}.weight"], weights[f"{layer}.weight"] + up @ mid @ down, atol=TOLERANCE)


@pytest.mark.parametrize("axes", ["linear for a convolution", "convolution for a linear layer"])
def test_a_1x1_convolution_and_a_linear_layer_are_the_same(
    axes: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    pairs = made.random_pairs("proj_in" if "linear for" in axes else "to_q")
    turned = {
        layer: tuple(value[:, :, 0, 0] if value.dim() == 4 else value[:, :, None, None] for value in pair)
        for layer, pair in pairs.items()
    }
    files = [made.write(made.kohya(each), tmp_path / f"{i}.safetensors") for i, each in enumerate((pairs, turned))]
    straight, other = (merged(weights, LoraFile(file=str(file))) for file in files)
    assert largest_difference(straight, other) == 0 < largest_difference(straight, weights)


def test_peft_may_put_the_name_of_its_adapter_into_the_keys(weights: dict[str, Tensor], tmp_path: Path) -> None:
    plain = made.peft(ATTENTION)
    named = {key.replace(".weight", ".ink_2.weight"): value for key, value in plain.items()}
    files = [made.write(each, tmp_path / f"{i}.safetensors") for i, each in enumerate((plain, named))]
    one, other = (merged(weights, LoraFile(file=str(file))) for file in files)
    assert largest_difference(one, other) == 0 < largest_difference(one, weights)


def test_at_sd15s_size_every_spelling_means_one_layer() -> None:
    with torch.device("meta"):
        unet, text = UNet2DConditionModel(cross_attention_dim=768), CLIPTextModel(CLIPTextConfig(hidden_size=768))
    names = {f"unet.{name}": 0 for name in unet.state_dict()} | {
        f"text_encoder.{name}": 0 for name in text.state_dict()
    }
    weights = [key for key in names if key.endswith(".weight") and "norm" not in key and "embeddings" not in key]
    spellings = layer_spellings(weights, layers_per_block=2)
    assert set(spellings.values()) == set(weights)
    block = "transformer_blocks_0_attn2_to_k"
    assert (
        spellings[f"lora_unet_down_blocks_2_attentions_1_{block}"] == spellings[f"lora_unet_input_blocks_8_1_{block}"]
    )
    assert (
        spellings[f"lora_unet_up_blocks_3_attentions_2_{block}"] == spellings[f"lora_unet_output_blocks_11_1_{block}"]
    )
    assert spellings["lora_unet_input_blocks_3_0_op"] == "unet.down_blocks.0.downsamplers.0.conv.weight"
    assert spellings["lora_te_text_model_encoder_layers_11_mlp_fc2"] == "text_encoder.encoder.layers.11.mlp.fc2.weight"
    by_weight = [layer_spellings([key], layers_per_block=2) for key in weights]
    assert sum(map(len, by_weight)) == len(spellings)


def test_several_files_add_up_and_the_same_twice_counts_twice(weights: dict[str, Tensor], tmp_path: Path) -> None:
    first = made.write(made.kohya(ATTENTION), tmp_path / "a.safetensors")
    second = made.write(made.peft(UNET), tmp_path / "b.safetensors")
    one, two = LoraFile(file=str(first), scale=0.5), LoraFile(file=str(second), scale=-1.5)
    alone = [merged(weights, lora) for lora in (one, two)]
    both, twice = merged(weights, one, two), merged(weights, one, one)
    summed = {key: alone[0][key] + alone[1][key] - value for key, value in weights.items()}
    assert largest_difference(both, summed) <= TOLERANCE
    doubled = merged(weights, LoraFile(file=str(first), scale=1.0))
    assert largest_difference(twice, doubled) <= TOLERANCE


def test_a_scale_of_0_leaves_the_values_as_they_are(weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = made.write(made.kohya(ALL), tmp_path / "a.safetensors")
    assert largest_difference(merged(weights, LoraFile(file=str(file), scale=0)), weights) == 0


def test_a_part_that_is_changed_becomes_fp32_whole_and_another_keeps_its_type(tmp_path: Path) -> None:
    weights = {key: value.half() for key, value in made.embedded_weights().items()}
    changes = merge(weights, LoraFile(file=str(made.write(made.kohya(UNET), tmp_path / "a.safetensors"))))
    assert changes.components == {"unet"}
    types = {key.partition(".")[0]: set[torch.dtype]() for key in weights}
    for key, value in weights.items():
        types[key.partition(".")[0]].add(changes.merged(key, value).dtype)
    assert types == {"unet": {torch.float32}, "text_encoder": {torch.float16}}


def test_a_text_encoder_whose_tensors_are_not_nested_takes_the_same_files(tmp_path: Path) -> None:
    nested = made.embedded_weights()
    flat = {key.replace("text_encoder.text_model.", "text_encoder."): value for key, value in nested.items()}
    file = LoraFile(file=str(made.write(made.kohya(LINEAR), tmp_path / "a.safetensors")))
    ours = {
        key.replace("text_encoder.", "text_encoder.text_model."): value for key, value in merged(flat, file).items()
    }
    assert largest_difference(ours, merged(nested, file)) == 0


def test_a_scale_that_no_weight_could_hold_is_refused_before_anything_is_merged(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    file = made.write(made.kohya(ATTENTION), tmp_path / "a.safetensors")
    with pytest.raises(Refused, match=r"a\.safetensors: lora_.* beyond all numbers at scale 1e\+39 .* smaller scale"):
        merge(weights, LoraFile(file=str(file), scale=1e39))
