"""diffusers' name of a tensor -> its name in the LDM layout of CompVis, by rule alone (formats.md 1)."""

from collections.abc import Iterable

from torch import Tensor

from stages.system.refusal import Refused

LDM_PREFIXES = {
    "unet": "model.diffusion_model",
    "vae": "first_stage_model",
    "text_encoder": "cond_stage_model.transformer.text_model",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"} | {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
TEXT_ENCODER_ROOTS = {"embeddings", "encoder", "final_layer_norm"}


def ldm_names(keys: Iterable[str], layers: int, vae_levels: int) -> dict[str, str]:
    """Tensors named `<component>.<diffusers' name>` -> their names in one LDM file, each used once.

    `layers` is the UNet's `layers_per_block`, `vae_levels` the number of the VAE's resolutions. Raises `Refused` for a
    tensor that no SD-1.x model has and for two that would share a name.
    """
    names = {key: ldm_name(key, layers, vae_levels) for key in keys}
    taken: dict[str, str] = {}
    for key, name in names.items():
        if name in taken:
            raise Refused(f"export: {key} and {taken[name]} are both {name} in the LDM layout - keep one of them")
        taken[name] = key
    return names


def ldm_name(key: str, layers: int, vae_levels: int) -> str:
    """The LDM name of one tensor; raises `Refused` for one that no SD-1.x model has."""
    component, *words = key.split(".")
    name = ""
    if component == "unet":
        name = _unet_name(words, layers)
    elif component == "vae":
        name = _vae_name(words, vae_levels)
    elif component == "text_encoder":
        name = _text_encoder_name(words)
    if not name:
        raise Refused(f"export: no SD-1.x model has a tensor {key} - the LDM layout holds SD-1.x models only")
    return f"{LDM_PREFIXES[component]}.{name}"


def to_ldm(key: str, value: Tensor) -> Tensor:
    """The tensor in LDM's shape: the VAE's attention is made of 1x1 convolutions, [out, in] -> [out, in, 1, 1]."""
    return value[:, :, None, None] if _is_projection(key) else value


def to_diffusers(key: str, value: Tensor) -> Tensor:
    """The inverse of `to_ldm`; `key` is diffusers' name in both."""
    return value[:, :, 0, 0] if _is_projection(key) else value


def _is_projection(key: str) -> bool:
    return key.startswith("vae.") and ".attentions.0.to_" in key and key.endswith(".weight")


def _text_encoder_name(words: list[str]) -> str:
    """One tensor of the text encoder, whose names transformers >= 5.6 no longer nests; empty if unknown."""
    inner = words[1:] if words[:1] == ["text_model"] else words
    return ".".join(inner) if TEXT_ENCODER_ROOTS.intersection(inner[:1]) else ""


def _unet_name(words: list[str], layers: int) -> str:
    """One tensor of the UNet; empty if unknown."""
    match words:
        case ["conv_in", kind]:
            return f"input_blocks.0.0.{kind}"
        case ["time_embedding", ("linear_1" | "linear_2") as layer, kind]:
            return f"time_embed.{0 if layer == 'linear_1' else 2}.{kind}"
        case ["conv_norm_out", kind]:
            return f"out.0.{kind}"
        case ["conv_out", kind]:
            return f"out.2.{kind}"
        case ["mid_block", "resnets", j, inner, kind] if inner in UNET_RESNET:
            return f"middle_block.{2 * int(j)}.{UNET_RESNET[inner]}.{kind}"
        case ["mid_block", "attentions", "0", *inner]:
            return ".".join(["middle_block.1", *inner])
        case [("down_blocks" | "up_blocks") as side, b, *rest]:
            return _unet_block_name(side == "down_blocks", int(b), rest, layers)
    return ""


def _unet_block_name(down: bool, b: int, words: list[str], layers: int) -> str:
    """One block: diffusers counts within it, LDM through the whole side, where each level takes `layers` + 1 slots.

    Down, slot 0 is `conv_in` and a level's last slot its downsampler; up, the upsampler stands in the last slot behind
    the resnet and, in all blocks but the first, the attention.
    """
    side, first = ("input_blocks", (layers + 1) * b + 1) if down else ("output_blocks", (layers + 1) * b)
    match words:
        case ["resnets", j, inner, kind] if inner in UNET_RESNET:
            return f"{side}.{first + int(j)}.0.{UNET_RESNET[inner]}.{kind}"
        case ["attentions", j, *inner]:
            return ".".join([f"{side}.{first + int(j)}.1", *inner])
        case ["downsamplers", "0", "conv", kind] if down:
            return f"{side}.{first + layers}.0.op.{kind}"
        case ["upsamplers", "0", "conv", kind] if not down:
            return f"{side}.{first + layers}.{1 if b == 0 else 2}.conv.{kind}"
    return ""


def _vae_name(words: list[str], levels: int) -> str:
    """One tensor of the autoencoder, whose LDM decoder counts its resolutions from the finest; empty if unknown."""
    match words:
        case [("quant_conv" | "post_quant_conv"), _] | [("encoder" | "decoder"), ("conv_in" | "conv_out"), _]:
            return ".".join(words)
        case [("encoder" | "decoder") as half, "conv_norm_out", kind]:
            return f"{half}.norm_out.{kind}"
        case [half, "mid_block", "resnets", j, inner, kind] if inner in VAE_RESNET:
            return f"{half}.mid.block_{int(j) + 1}.{VAE_RESNET[inner]}.{kind}"
        case [half, "mid_block", "attentions", "0", "to_out", "0", kind]:
            return f"{half}.mid.attn_1.proj_out.{kind}"
        case [half, "mid_block", "attentions", "0", inner, kind] if inner in VAE_ATTENTION:
            return f"{half}.mid.attn_1.{VAE_ATTENTION[inner]}.{kind}"
        case ["encoder", "down_blocks", i, *rest]:
            return _vae_block_name(f"encoder.down.{i}", rest)
        case ["decoder", "up_blocks", i, *rest]:
            return _vae_block_name(f"decoder.up.{levels - 1 - int(i)}", rest)
    return ""


def _vae_block_name(prefix: str, words: list[str]) -> str:
    match words:
        case ["resnets", j, inner, kind] if inner in VAE_RESNET:
            return f"{prefix}.block.{j}.{VAE_RESNET[inner]}.{kind}"
        case [("downsamplers" | "upsamplers") as sampler, "0", "conv", kind]:
            return f"{prefix}.{sampler.removesuffix('rs')}.conv.{kind}"
    return ""
