"""Whether a folder's configs are those of a Stable Diffusion 1.x model: what else they say is refused by name."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from configs.refusal import Refused
from stages.nets.files import read_json

COMPONENTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
MOST_LAYERS = 100
"""A config that asks for more is broken, and would fill the memory before anybody compares it with its weights."""


class Rule(NamedTuple):
    """What a config's entry has to be, for a machine and for a person."""

    holds: Callable[[Any], bool]
    meaning: str


def _only(*values: Any) -> Rule:
    """One of these, of the same type: JSON knows true from 1."""
    shown = " or ".join("nothing" if value is None else repr(value) for value in values)

    def holds(given: Any) -> bool:
        return any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in values)

    return Rule(holds, shown)


def _whole(least: int, most: int | None = None) -> Rule:
    """A whole number, neither below `least` nor above `most`."""
    meaning = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    return Rule(
        lambda given: (
            isinstance(given, int)
            and not isinstance(given, bool)
            and given >= least
            and (most is None or given <= most)
        ),
        meaning,
    )


def _four_widths(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 4 and all(WIDTH.holds(one) for one in given)


def _is_scale(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given) and given > 0


WIDTH = _whole(1, 1 << 16)
NOTHING = _only(None)
UNET_MUST: Mapping[str, Rule] = {
    "down_block_types": _only(["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]),
    "up_block_types": _only(["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    "in_channels": _only(4),
    "out_channels": _only(4),
    "sample_size": _whole(1, 1 << 12),
    "block_out_channels": Rule(_four_widths, "four whole numbers"),
    "cross_attention_dim": WIDTH,
}
"""What must be there, and how."""
UNET_MAY: Mapping[str, Rule] = {
    "layers_per_block": _whole(1, MOST_LAYERS),
    "attention_head_dim": WIDTH,
    "transformer_layers_per_block": _only(1, [1, 1, 1, 1]),
    "mid_block_type": _only("UNetMidBlock2DCrossAttn"),
    "use_linear_projection": _only(False, None),
    "only_cross_attention": _only(False, None, [False] * 4),
    "dual_cross_attention": _only(False, None),
    "center_input_sample": _only(False, None),
    "resnet_skip_time_act": _only(False, None),
    "class_embeddings_concat": _only(False, None),
    "flip_sin_to_cos": _only(True),
    "freq_shift": _only(0),
    "norm_eps": _only(1e-5),
    "downsample_padding": _only(1),
    "conv_in_kernel": _only(3),
    "conv_out_kernel": _only(3),
    "act_fn": _only("silu", "swish"),
    "resnet_time_scale_shift": _only("default"),
    "resnet_out_scale_factor": _only(1.0),
    "mid_block_scale_factor": _only(1),
    "time_embedding_type": _only("positional"),
    "attention_type": _only("default"),
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
        NOTHING,
    ),
}
"""What may be left out, and how it is otherwise."""
VAE_MAY: Mapping[str, Rule] = {
    "in_channels": _only(3),
    "out_channels": _only(3),
    "layers_per_block": _whole(1, MOST_LAYERS),
    "scaling_factor": Rule(_is_scale, "a number above 0"),
    "shift_factor": NOTHING,
    "latents_mean": NOTHING,
    "latents_std": NOTHING,
}
TEXT_MUST: Mapping[str, Rule] = {
    "hidden_size": WIDTH,
    "vocab_size": _whole(1, 1 << 24),
    "max_position_embeddings": _whole(2, 1 << 16),
    "num_hidden_layers": _whole(1, MOST_LAYERS),
    "num_attention_heads": WIDTH,
    "intermediate_size": _whole(1, 1 << 20),
}


def check_anatomy(folder: Path) -> None:
    """Raise `Refused` unless the folder holds a text-to-image model with SD1.x's nine blocks."""
    index = read_json(folder / "model_index.json")
    for name, expected in COMPONENTS.items():
        entry = index.get(name)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if kind != expected:
            raise Refused(f"teacher: {folder}: {name} is {kind}, not {expected} - only SD-1.x models can be converted")
    _check(folder / "unet", read_json(folder / "unet" / "config.json"), UNET_MUST, UNET_MAY)


def check_fit(folder: Path) -> None:
    """Raise `Refused` unless autoencoder and text encoder are of SD1.x's kind and fit the UNet that they serve."""
    unet, vae, text = (read_json(folder / part / "config.json") for part in COMPONENTS)
    _check(folder / "vae", vae, {"latent_channels": _only(unet["in_channels"])}, VAE_MAY)
    _check(folder / "text_encoder", text, TEXT_MUST, {})
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise Refused(
            f"teacher: {folder}/unet: cross_attention_dim is {unet['cross_attention_dim']}, the text encoder's "
            f"hidden_size is {text['hidden_size']} - put together the parts of one model"
        )


def _check(where: Path, config: Mapping[str, Any], must: Mapping[str, Rule], may: Mapping[str, Rule]) -> None:
    for key, rule in {**must, **may}.items():
        if (key in must or key in config) and not rule.holds(config.get(key)):
            raise Refused(
                f"teacher: {where}: {key} is {_short(config.get(key))}, an SD-1.x model has {rule.meaning} - "
                "only SD-1.x models can be converted"
            )


def _short(value: Any) -> str:
    said = str(value)
    return said if len(said) <= 80 else f"{said[:80]}..."
