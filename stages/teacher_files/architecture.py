"""Whether the configs of a diffusers folder are those of a Stable Diffusion 1.x model."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.system.refusal import Refused, format_value
from stages.teacher_files.folder import read_json

COMPONENT_CLASS_NAMES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
PART_NAMES = tuple(COMPONENT_CLASS_NAMES)
MAX_LAYERS = 100
"""A config that asks for more is broken, and would fill the memory before it is compared with its weights."""


class ConfigRule(NamedTuple):
    """Which values an entry of a config may have."""

    accepts: Callable[[Any], bool]
    description: str


def _any_of(*allowed: Any) -> ConfigRule:
    """One of these values, of the same type: JSON distinguishes true from 1."""

    def accepts(value: Any) -> bool:
        return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in allowed)

    return ConfigRule(accepts, " or ".join("nothing" if known is None else repr(known) for known in allowed))


def _integer_between(minimum: int, maximum: int) -> ConfigRule:
    description = f"a whole number from {minimum} to {maximum}"
    return ConfigRule(lambda value: type(value) is int and minimum <= value <= maximum, description)


def _are_four_widths(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(WIDTH.accepts, value))


def _is_even_width(value: Any) -> bool:
    return WIDTH.accepts(value) and value % 2 == 0 and value > 2


def _are_layers(value: Any) -> bool:
    counts = value if isinstance(value, list) else [value] * 4
    return len(counts) == 4 and all(type(count) is int and 0 <= count <= MAX_LAYERS for count in counts)


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


WIDTH = _integer_between(1, 1 << 16)
UNSET, UNSET_OR_FALSE = _any_of(None), _any_of(False, None)
UNET_REQUIRED: Mapping[str, ConfigRule] = {
    "down_block_types": _any_of(["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]),
    "up_block_types": _any_of(["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    "in_channels": _any_of(4),
    "out_channels": _any_of(4),
    "sample_size": _integer_between(1, 1 << 12),
    "block_out_channels": ConfigRule(_are_four_widths, "four whole numbers"),
    "cross_attention_dim": WIDTH,
}
"""Entries that must be there."""
UNET_FLAGS = (
    "use_linear_projection", "dual_cross_attention", "center_input_sample", "resnet_skip_time_act",
    "class_embeddings_concat",
)  # fmt: skip
UNET_EXTENSIONS = (
    "num_attention_heads", "reverse_transformer_layers_per_block", "mid_block_only_cross_attention",
    "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds",
    "projection_class_embeddings_input_dim", "addition_embed_type", "addition_time_embed_dim", "time_embedding_dim",
    "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim",
)  # fmt: skip
"""What other models have and SD1.x has not."""
UNET_OPTIONAL: Mapping[str, ConfigRule] = {
    "layers_per_block": _integer_between(1, MAX_LAYERS),
    "attention_head_dim": WIDTH,
    "transformer_layers_per_block": _any_of(1, [1, 1, 1, 1]),
    "mid_block_type": _any_of("UNetMidBlock2DCrossAttn"),
    "only_cross_attention": _any_of(False, None, [False] * 4),
    "flip_sin_to_cos": _any_of(True),
    "freq_shift": _any_of(0),
    "norm_eps": _any_of(1e-5),
    "downsample_padding": _any_of(1),
    "conv_in_kernel": _any_of(3),
    "conv_out_kernel": _any_of(3),
    "act_fn": _any_of("silu", "swish"),
    "resnet_time_scale_shift": _any_of("default"),
    "resnet_out_scale_factor": _any_of(1.0),
    "mid_block_scale_factor": _any_of(1),
    "time_embedding_type": _any_of("positional"),
    "attention_type": _any_of("default"),
    **dict.fromkeys(UNET_FLAGS, UNSET_OR_FALSE),
    **dict.fromkeys(UNET_EXTENSIONS, UNSET),
}
"""Entries that may be left out."""
VAE_OPTIONAL: Mapping[str, ConfigRule] = {
    "in_channels": _any_of(3),
    "out_channels": _any_of(3),
    "layers_per_block": _integer_between(1, MAX_LAYERS),
    "scaling_factor": ConfigRule(_is_scale, "a number above 0"),
    "shift_factor": UNSET,
    "latents_mean": UNSET,
    "latents_std": UNSET,
}
TEXT_ENCODER_REQUIRED: Mapping[str, ConfigRule] = {
    "hidden_size": WIDTH,
    "vocab_size": _integer_between(1, 1 << 24),
    "max_position_embeddings": _integer_between(2, 1 << 16),
    "num_hidden_layers": _integer_between(1, MAX_LAYERS),
    "num_attention_heads": WIDTH,
    "intermediate_size": _integer_between(1, 1 << 20),
}


GUIDANCE_INPUT: Mapping[str, ConfigRule] = {"time_cond_proj_dim": ConfigRule(_is_even_width, "an even whole number")}
"""Of a student that takes the guidance scale as an input; its embedding has pairs of columns."""


PRUNED_SHAPE: Mapping[str, ConfigRule] = {
    "layers_per_block": ConfigRule(_are_layers, "a whole number, or four"),
    "mid_block_type": _any_of("UNetMidBlock2DCrossAttn", None),
}
"""Of a student that was made without some of its teacher's layers."""


def check_sd1_architecture(folder: Path, *, guidance_input: bool = False, pruned: bool = False) -> None:
    """Raise `Refused` unless the folder holds a text-to-image model with the nine blocks of SD1.x.

    With `guidance_input` its UNet may take the guidance scale, as students of few steps do; with `pruned` it may lack
    layers.
    """
    index = read_json(folder / "model_index.json")
    for name, expected in COMPONENT_CLASS_NAMES.items():
        entry = index.get(name)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if kind != expected:
            raise Refused(f"teacher: {folder}: {name} is {kind}, not {expected} - only SD-1.x models can be converted")
    unet = read_json(folder / "unet" / "config.json")
    takes_guidance = guidance_input and unet.get("time_cond_proj_dim") is not None
    optional = {**UNET_OPTIONAL, **(GUIDANCE_INPUT if takes_guidance else {}), **(PRUNED_SHAPE if pruned else {})}
    _check_config(folder / "unet", unet, UNET_REQUIRED, optional)


def check_component_match(folder: Path) -> None:
    """Raise `Refused` unless autoencoder and text encoder are those of SD1.x and fit the UNet."""
    check_matching_configs({part: (folder / part, read_json(folder / part / "config.json")) for part in PART_NAMES})


def check_matching_configs(configs: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> None:
    """The same for the configs of three parts, each with the place that messages name."""
    (unet_place, unet), (vae_place, vae), (text_place, text) = (configs[part] for part in PART_NAMES)
    _check_config(vae_place, vae, {"latent_channels": _any_of(unet["in_channels"])}, VAE_OPTIONAL)
    _check_config(text_place, text, TEXT_ENCODER_REQUIRED, {})
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise Refused(
            f"teacher: {unet_place}: cross_attention_dim is {unet['cross_attention_dim']}, the text encoder's "
            f"hidden_size is {text['hidden_size']} - put together the parts of one model"
        )


def _check_config(
    where: Path, config: Mapping[str, Any], required: Mapping[str, ConfigRule], optional: Mapping[str, ConfigRule]
) -> None:
    for key, rule in {**required, **optional}.items():
        if (key in required or key in config) and not rule.accepts(config.get(key)):
            raise Refused(
                f"teacher: {where}: {key} is {format_value(config.get(key))}, an SD-1.x model has {rule.description} - "
                "only SD-1.x models can be converted"
            )
