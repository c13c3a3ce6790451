"""Whether a folder's configs are those of a Stable Diffusion 1.x model: what else they say is refused by name."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.nets.files import read_json
from stages.system.refusal import Refused

COMPONENT_CLASS_NAMES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
MAX_LAYERS = 100
"""A config that asks for more is broken, and would fill the memory before anybody compares it with its weights."""


class ConfigRule(NamedTuple):
    """What a config's entry has to be, for a machine and for a person."""

    accepts: Callable[[Any], bool]
    description: str


def _one_of(*values: Any) -> ConfigRule:
    """One of these, of the same type: JSON knows true from 1."""
    shown = " or ".join("nothing" if value is None else repr(value) for value in values)

    def holds(given: Any) -> bool:
        return any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in values)

    return ConfigRule(holds, shown)


def _integer_between(minimum: int, maximum: int | None = None) -> ConfigRule:
    """A whole number, neither below `least` nor above `most`."""
    meaning = f"a whole number from {minimum}" + ("" if maximum is None else f" to {maximum}")
    return ConfigRule(
        lambda given: (
            isinstance(given, int)
            and not isinstance(given, bool)
            and given >= minimum
            and (maximum is None or given <= maximum)
        ),
        meaning,
    )


def _four_widths(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(WIDTH_RULE.accepts(one) for one in value)


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


WIDTH_RULE = _integer_between(1, 1 << 16)
UNSET = _one_of(None)
UNET_REQUIRED: Mapping[str, ConfigRule] = {
    "down_block_types": _one_of(["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]),
    "up_block_types": _one_of(["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    "in_channels": _one_of(4),
    "out_channels": _one_of(4),
    "sample_size": _integer_between(1, 1 << 12),
    "block_out_channels": ConfigRule(_four_widths, "four whole numbers"),
    "cross_attention_dim": WIDTH_RULE,
}
"""What must be there, and how."""
UNET_OPTIONAL: Mapping[str, ConfigRule] = {
    "layers_per_block": _integer_between(1, MAX_LAYERS),
    "attention_head_dim": WIDTH_RULE,
    "transformer_layers_per_block": _one_of(1, [1, 1, 1, 1]),
    "mid_block_type": _one_of("UNetMidBlock2DCrossAttn"),
    "use_linear_projection": _one_of(False, None),
    "only_cross_attention": _one_of(False, None, [False] * 4),
    "dual_cross_attention": _one_of(False, None),
    "center_input_sample": _one_of(False, None),
    "resnet_skip_time_act": _one_of(False, None),
    "class_embeddings_concat": _one_of(False, None),
    "flip_sin_to_cos": _one_of(True),
    "freq_shift": _one_of(0),
    "norm_eps": _one_of(1e-5),
    "downsample_padding": _one_of(1),
    "conv_in_kernel": _one_of(3),
    "conv_out_kernel": _one_of(3),
    "act_fn": _one_of("silu", "swish"),
    "resnet_time_scale_shift": _one_of("default"),
    "resnet_out_scale_factor": _one_of(1.0),
    "mid_block_scale_factor": _one_of(1),
    "time_embedding_type": _one_of("positional"),
    "attention_type": _one_of("default"),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "reverse_transformer_layers_per_block",
            "mid_block_only_cross_attention",
            "cross_attention_norm",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "class_embed_type",
            "num_class_embeds",
            "projection_class_embeddings_input_dim",
            "addition_embed_type",
            "addition_time_embed_dim",
            "time_embedding_dim",
            "time_embedding_act_fn",
            "timestep_post_act",
            "time_cond_proj_dim",
        ),
        UNSET,
    ),
}
"""What may be left out, and how it is otherwise."""
VAE_OPTIONAL: Mapping[str, ConfigRule] = {
    "in_channels": _one_of(3),
    "out_channels": _one_of(3),
    "layers_per_block": _integer_between(1, MAX_LAYERS),
    "scaling_factor": ConfigRule(_is_scale, "a number above 0"),
    "shift_factor": UNSET,
    "latents_mean": UNSET,
    "latents_std": UNSET,
}
TEXT_ENCODER_REQUIRED: Mapping[str, ConfigRule] = {
    "hidden_size": WIDTH_RULE,
    "vocab_size": _integer_between(1, 1 << 24),
    "max_position_embeddings": _integer_between(2, 1 << 16),
    "num_hidden_layers": _integer_between(1, MAX_LAYERS),
    "num_attention_heads": WIDTH_RULE,
    "intermediate_size": _integer_between(1, 1 << 20),
}


def check_sd1_architecture(folder: Path) -> None:
    """Raise `Refused` unless the folder holds a text-to-image model with SD1.x's nine blocks."""
    index = read_json(folder / "model_index.json")
    for name, expected in COMPONENT_CLASS_NAMES.items():
        entry = index.get(name)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if kind != expected:
            raise Refused(f"teacher: {folder}: {name} is {kind}, not {expected} - only SD-1.x models can be converted")
    _check_config(folder / "unet", read_json(folder / "unet" / "config.json"), UNET_REQUIRED, UNET_OPTIONAL)


def check_component_match(folder: Path) -> None:
    """Raise `Refused` unless autoencoder and text encoder are of SD1.x's kind and fit the UNet that they serve."""
    unet, vae, text = (read_json(folder / part / "config.json") for part in COMPONENT_CLASS_NAMES)
    _check_config(folder / "vae", vae, {"latent_channels": _one_of(unet["in_channels"])}, VAE_OPTIONAL)
    _check_config(folder / "text_encoder", text, TEXT_ENCODER_REQUIRED, {})
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise Refused(
            f"teacher: {folder}/unet: cross_attention_dim is {unet['cross_attention_dim']}, the text encoder's "
            f"hidden_size is {text['hidden_size']} - put together the parts of one model"
        )


def _check_config(
    where: Path, config: Mapping[str, Any], required: Mapping[str, ConfigRule], optional: Mapping[str, ConfigRule]
) -> None:
    for key, rule in {**required, **optional}.items():
        if (key in required or key in config) and not rule.accepts(config.get(key)):
            raise Refused(
                f"teacher: {where}: {key} is {_truncate(config.get(key))}, an SD-1.x model has {rule.description} - "
                "only SD-1.x models can be converted"
            )


def _truncate(value: Any) -> str:
    said = str(value)
    return said if len(said) <= 80 else f"{said[:80]}..."
