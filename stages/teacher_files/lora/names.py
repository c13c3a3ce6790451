"""What a key of a LoRA file means: a part of which layer, in each of the namings under which such files are spread.

No name is taken apart by rules on underscores, which would be ambiguous: every layer of the model at hand is spelled in
each naming, and a key is looked up.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from stages.teacher_files.ldm_names import LDM_PREFIXES, ldm_name

Role: TypeAlias = Literal["down", "up", "mid", "alpha"]

ROLE_ENDINGS: Mapping[str, Role] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
"""Endings of kohya's, peft's, and diffusers' newer and older keys, in this order."""
ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.\w+(?=\.weight$)")
"""peft's name of an adapter, which diffusers takes off when it saves one."""
OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""A text encoder's projections -> their names among diffusers' attention processors."""
TEXT_MODEL = "text_model."
COMFYUI_TEXT_ENCODER = "text_encoders.clip_l.transformer.text_model."
OTHER_METHODS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.dora_scale$|\.lora_magnitude_vector\b"), "DoRA, which also rescales the weights"),
    (re.compile(r"\.hada_[wt]\d"), "LoHa (Hadamard products)"),
    (re.compile(r"\.lokr_[wt]\d"), "LoKr (Kronecker products)"),
    (re.compile(r"\.boft_|\.oft_\w+\.boft"), "BOFT (butterfly rotations)"),
    (re.compile(r"\.oft_|\.rescale$"), "OFT (rotations)"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$|\.ia3_l\b"), "IA3 (factors of activations)"),
    (re.compile(r"\.vera_lambda_"), "VeRA"),
    (re.compile(r"\.w_norm$|\.b_norm$"), "norm tuning"),
    (re.compile(r"\.diff(_b)?$|\.set_weight$"), "whole differences of weights or biases (diff, diff_b)"),
    (re.compile(r"\.lora_(B|up)(\.default)?\.bias$|\.lora\.up\.bias$"), "LoRA with biases"),
    (re.compile(r"\.lora_embedding_[AB]\b"), "LoRA of an embedding table"),
    (re.compile(r"^bundle_emb\.|^string_to_param|^emb_params$|^clip_[lg]$"), "textual inversion (embeddings of words)"),
    (re.compile(r"^lora_controlnet$"), "Control-LoRA"),
)
"""Keys -> what their files hold instead of, or besides, low-rank pairs."""
OTHER_MODELS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^lora_te[23]_|^text_encoder_[23]\."), "a model with several text encoders, such as SDXL"),
    (re.compile(r"^lora_unet_(double|single|joint)_blocks|^(lora_)?transformer[._]"), "a diffusion transformer"),
    (re.compile(r"^lora_prior"), "Stable Cascade"),
    (re.compile(r"transformer_blocks[._][1-9]"), "SDXL"),
    (re.compile(r"motion_module|temporal_transformer"), "AnimateDiff's motion modules"),
)
WIDTH_MODELS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL's refiner"}
"""Width of the texts that a network reads -> the models that have it."""
CROSS_ATTENTION_INPUT = re.compile(r"attn2[._](processor\.)?to_[kv]\b|attn2[._](processor\.)?to_[kv]_lora")


class LayerPart(NamedTuple):
    """What a key of a LoRA file holds."""

    layer: str
    """The layer's name, as it is spelled in the file."""
    role: Role


def parse_key(key: str) -> LayerPart | None:
    """The layer and the part of its pair that a key names; None for a key of another kind."""
    plain = ADAPTER_NAME.sub(r"\1", key.replace(".processor.", "."))
    for ending, role in ROLE_ENDINGS.items():
        if plain.endswith(ending):
            return LayerPart(plain.removesuffix(ending), role)
    return None


def layer_spellings(weights: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Every spelling of a layer -> its weight, for weights `unet.<name>.weight` and `text_encoder.<name>.weight`.

    Raises `Refused` for a UNet that is not of SD-1.x.
    """
    spellings: dict[str, str] = {}
    for key in weights:
        component, _, name = key.removesuffix(".weight").partition(".")
        in_file = ldm_name(key, layers_per_block, vae_levels=0)  # of which no name of these parts depends
        ldm = in_file.removeprefix(f"{LDM_PREFIXES[component]}.").removesuffix(".weight")
        spelled = _unet_spellings(name, ldm) if component == "unet" else _text_encoder_spellings(ldm)
        spellings |= dict.fromkeys(spelled, key)
    return spellings


def kohya_layer(component: str, layer: str) -> str:
    """kohya's name of a layer of the UNet or the text encoder."""
    prefix = "lora_unet" if component == "unet" else "lora_te"
    return f"{prefix}_{layer.replace('.', '_')}"


def _unet_spellings(name: str, ldm: str) -> list[str]:
    dotted = [name, *([name.removesuffix(".0")] if name.endswith(".to_out.0") else [])]
    return [
        kohya_layer("unet", name),
        kohya_layer("unet", ldm),
        f"lycoris_{name.replace('.', '_')}",
        *dotted,
        *(f"unet.{word}" for word in dotted),
        f"diffusion_model.{ldm}",
        f"model.diffusion_model.{ldm}",
    ]


def _text_encoder_spellings(name: str) -> list[str]:
    """`name` is without `text_model.`, which some files have and some have not."""
    stem, _, last = name.rpartition(".")
    dotted = [name, *([f"{stem}.{OLD_PROJECTIONS[last]}"] if last in OLD_PROJECTIONS else [])]
    nested = [f"{TEXT_MODEL}{word}" for word in dotted]
    underscored = [word.replace(".", "_") for word in (name, f"{TEXT_MODEL}{name}")]
    return [
        *(f"{prefix}_{word}" for prefix in ("lora_te", "lora_te1") for word in underscored),
        *(f"text_encoder.{word}" for word in (*dotted, *nested)),
        *nested,
        f"{COMFYUI_TEXT_ENCODER}{name}",
    ]


def other_method(keys: Iterable[str]) -> tuple[str, str] | None:
    """The first key that no plain LoRA has, and the method that has it; None where there is none."""
    for key in keys:
        for pattern, method in OTHER_METHODS:
            if pattern.search(key):
                return key, method
    return None


def other_model(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> str:
    """What a LoRA that does not fit looks like, as " - it looks like one of SDXL"; empty where nothing shows it."""
    for key in shapes:
        for pattern, model in OTHER_MODELS:
            if pattern.search(key):
                return f", it looks like one of {model}"
    for key, shape in shapes.items():
        part = parse_key(key)
        if part and part.role == "down" and CROSS_ATTENTION_INPUT.search(part.layer) and len(shape) >= 2:
            model = WIDTH_MODELS.get(shape[1], f"a model whose texts are {shape[1]} wide")
            return f", it looks like one of {model}"
    stated = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    return f", its metadata say {stated[:40]!r}" if stated else ""
