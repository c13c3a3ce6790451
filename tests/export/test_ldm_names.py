"""The names of one LDM file, against CompVis's own way of building the three networks, written out here once more."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from stages.system.refusal import Refused
from stages.teacher_files.ldm_names import ldm_name, ldm_names, to_diffusers, to_ldm
from stages.tiny import anatomy

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def conv(name: str, inputs: int, outputs: int, side: int = 3) -> Shapes:
    yield f"{name}.weight", (outputs, inputs, side, side)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def unet_resnet(name: str, inputs: int, outputs: int) -> Shapes:
    yield from norm(f"{name}.in_layers.0", inputs)
    yield from conv(f"{name}.in_layers.2", inputs, outputs)
    yield from linear(f"{name}.emb_layers.1", 1280, outputs)
    yield from norm(f"{name}.out_layers.0", outputs)
    yield from conv(f"{name}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        yield from conv(f"{name}.skip_connection", inputs, outputs, 1)


def transformer(name: str, width: int) -> Shapes:
    yield from norm(f"{name}.norm", width)
    yield from conv(f"{name}.proj_in", width, width, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", width), ("attn2", 768)):
        yield from linear(f"{block}.{attention}.to_q", width, width, bias=False)
        yield from linear(f"{block}.{attention}.to_k", context, width, bias=False)
        yield from linear(f"{block}.{attention}.to_v", context, width, bias=False)
        yield from linear(f"{block}.{attention}.to_out.0", width, width)
    yield from linear(f"{block}.ff.net.0.proj", width, 8 * width)
    yield from linear(f"{block}.ff.net.2", 4 * width, width)
    for k in (1, 2, 3):
        yield from norm(f"{block}.norm{k}", width)
    yield from conv(f"{name}.proj_out", width, width, 1)


def compvis_unet() -> Shapes:
    """openaimodel.UNetModel: width 320, multiples 1, 2, 4, 4, two resnets a level, attention at factors 1, 2, 4."""
    yield from linear("time_embed.0", 320, 1280)
    yield from linear("time_embed.2", 1280, 1280)
    yield from conv("input_blocks.0.0", 4, 320)
    width, slot, skips = 320, 1, [320]
    for level, multiple in enumerate((1, 2, 4, 4)):
        for _ in range(2):
            yield from unet_resnet(f"input_blocks.{slot}.0", width, 320 * multiple)
            width = 320 * multiple
            if level < 3:
                yield from transformer(f"input_blocks.{slot}.1", width)
            skips.append(width)
            slot += 1
        if level < 3:
            yield from conv(f"input_blocks.{slot}.0.op", width, width)
            skips.append(width)
            slot += 1
    yield from unet_resnet("middle_block.0", 1280, 1280)
    yield from transformer("middle_block.1", 1280)
    yield from unet_resnet("middle_block.2", 1280, 1280)
    slot = 0
    for level, multiple in reversed(list(enumerate((1, 2, 4, 4)))):
        for i in range(3):
            yield from unet_resnet(f"output_blocks.{slot}.0", width + skips.pop(), 320 * multiple)
            width, place = 320 * multiple, 1
            if level < 3:
                yield from transformer(f"output_blocks.{slot}.{place}", width)
                place += 1
            if level > 0 and i == 2:
                yield from conv(f"output_blocks.{slot}.{place}.conv", width, width)
            slot += 1
    yield from norm("out.0", 320)
    yield from conv("out.2", 320, 4)


def vae_resnet(name: str, inputs: int, outputs: int) -> Shapes:
    yield from norm(f"{name}.norm1", inputs)
    yield from conv(f"{name}.conv1", inputs, outputs)
    yield from norm(f"{name}.norm2", outputs)
    yield from conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from conv(f"{name}.nin_shortcut", inputs, outputs, 1)


def vae_middle(half: str) -> Shapes:
    yield from vae_resnet(f"{half}.mid.block_1", 512, 512)
    yield from norm(f"{half}.mid.attn_1.norm", 512)
    for layer in ("q", "k", "v", "proj_out"):
        yield from conv(f"{half}.mid.attn_1.{layer}", 512, 512, 1)
    yield from vae_resnet(f"{half}.mid.block_2", 512, 512)


def compvis_vae() -> Shapes:
    """ldm.modules.diffusionmodules.model: width 128, multiples 1, 2, 4, 4; two resnets a level down, three up."""
    yield from conv("encoder.conv_in", 3, 128)
    width = 128
    for level, multiple in enumerate((1, 2, 4, 4)):
        for j in range(2):
            yield from vae_resnet(f"encoder.down.{level}.block.{j}", width, 128 * multiple)
            width = 128 * multiple
        if level < 3:
            yield from conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from vae_middle("encoder")
    yield from norm("encoder.norm_out", 512)
    yield from conv("encoder.conv_out", 512, 8)
    yield from conv("quant_conv", 8, 8, 1)
    yield from conv("post_quant_conv", 4, 4, 1)
    yield from conv("decoder.conv_in", 4, 512)
    yield from vae_middle("decoder")
    for level, multiple in reversed(list(enumerate((1, 2, 4, 4)))):
        for j in range(3):
            yield from vae_resnet(f"decoder.up.{level}.block.{j}", width, 128 * multiple)
            width = 128 * multiple
        if level > 0:
            yield from conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from norm("decoder.norm_out", 128)
    yield from conv("decoder.conv_out", 128, 3)


def clip_text() -> Shapes:
    """The text half of CLIP-L/14: twelve layers of width 768."""
    yield "embeddings.token_embedding.weight", (49408, 768)
    yield "embeddings.position_embedding.weight", (77, 768)
    for k in range(12):
        layer = f"encoder.layers.{k}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{projection}", 768, 768)
        yield from norm(f"{layer}.layer_norm1", 768)
        yield from linear(f"{layer}.mlp.fc1", 768, 3072)
        yield from linear(f"{layer}.mlp.fc2", 3072, 768)
        yield from norm(f"{layer}.layer_norm2", 768)
    yield from norm("final_layer_norm", 768)


def golden() -> dict[str, tuple[int, ...]]:
    parts = {
        "model.diffusion_model.": compvis_unet(),
        "first_stage_model.": compvis_vae(),
        "cond_stage_model.transformer.text_model.": clip_text(),
    }
    return {prefix + name: shape for prefix, shapes in parts.items() for name, shape in shapes}


@pytest.fixture(scope="module")
def sd15() -> dict[str, torch.Tensor]:
    """The three networks of Stable Diffusion 1.5 by their configs, without weights."""
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
        }
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def test_sd15_has_exactly_the_names_and_shapes_of_compvis(sd15: dict[str, torch.Tensor]) -> None:
    names = ldm_names(sd15, layers=2, vae_levels=4)
    assert {name: tuple(to_ldm(key, sd15[key]).shape) for key, name in names.items()} == golden()


def test_the_golden_list_has_the_counts_and_parameters_of_sd15() -> None:
    counts = {
        "model.diffusion_model.": (686, 859_520_964),
        "model.diffusion_model.input_blocks.": (248, None),
        "model.diffusion_model.middle_block.": (46, None),
        "model.diffusion_model.output_blocks.": (384, None),
        "model.diffusion_model.time_embed.": (4, None),
        "model.diffusion_model.out.": (4, None),
        "first_stage_model.": (248, 83_653_863),
        "cond_stage_model.transformer.text_model.": (196, 123_060_480),
        "": (1130, 1_066_235_307),
    }
    listed = golden()
    for prefix, (keys, parameters) in counts.items():
        shapes = [shape for name, shape in listed.items() if name.startswith(prefix)]
        assert len(shapes) == keys
        assert parameters in (None, sum(torch.Size(shape).numel() for shape in shapes))


def test_the_map_is_a_bijection_on_shapes_too(sd15: dict[str, torch.Tensor]) -> None:
    names = ldm_names(sd15, layers=2, vae_levels=4)
    assert len(set(names.values())) == len(names) == 1130
    axes = {name for key, name in names.items() if to_ldm(key, sd15[key]).ndim != sd15[key].ndim}
    assert axes == {
        f"first_stage_model.{half}.mid.attn_1.{layer}.weight"
        for half in ("encoder", "decoder")
        for layer in ("q", "k", "v", "proj_out")
    }
    assert all(to_diffusers(key, to_ldm(key, value)).shape == value.shape for key, value in sd15.items())


def test_a_teacher_with_one_layer_a_block_is_named_by_its_own_sizes() -> None:
    with torch.device("meta"):
        unet = anatomy.build_unet().state_dict()
    names = ldm_names((f"unet.{name}" for name in unet), layers=1, vae_levels=4)
    assert (
        names["unet.down_blocks.1.resnets.0.conv1.weight"]
        == "model.diffusion_model.input_blocks.3.0.in_layers.2.weight"
    )
    assert names["unet.down_blocks.2.downsamplers.0.conv.bias"] == "model.diffusion_model.input_blocks.6.0.op.bias"
    assert names["unet.up_blocks.0.upsamplers.0.conv.bias"] == "model.diffusion_model.output_blocks.1.1.conv.bias"
    assert names["unet.up_blocks.1.upsamplers.0.conv.bias"] == "model.diffusion_model.output_blocks.3.2.conv.bias"


def test_a_text_encoder_gets_one_name_whether_transformers_nested_it_or_not() -> None:
    nested, flat = (ldm_name(f"text_encoder.{inner}final_layer_norm.bias", 2, 4) for inner in ("text_model.", ""))
    assert nested == flat == "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    with pytest.raises(Refused, match="are both cond_stage_model"):
        ldm_names(["text_encoder.text_model.final_layer_norm.bias", "text_encoder.final_layer_norm.bias"], 2, 4)


@pytest.mark.parametrize(
    "key",
    [
        "unet.add_embedding.linear_1.weight",
        "unet.down_blocks.0.resnets.0.norm3.weight",
        "unet.up_blocks.0.downsamplers.0.conv.bias",
        "vae.encoder.mid_block.attentions.0.query.weight",
        "text_encoder.text_projection.weight",
        "safety_checker.weight",
    ],
)
def test_a_tensor_that_no_sd1_model_has_is_refused_by_name(key: str) -> None:
    with pytest.raises(Refused, match=key):
        ldm_name(key, 2, 4)
