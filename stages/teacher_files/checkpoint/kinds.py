"""What a file of tensors is, by names and shapes alone: what it holds of an SD-1.x model, or why it is none."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stages.system.refusal import Refused, format_value
from stages.teacher_files.checkpoint.stored import StoredTensor, TensorFile

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""Prefixes of `DistributedDataParallel` and of `torch.compile`."""
PREFIXES: Sequence[tuple[str, str]] = (
    ("model.diffusion_model.", "unet"), ("diffusion_model.", "unet"), ("unet.", "unet"),
    ("first_stage_model.", "vae"), ("vae.", "vae"),
    ("cond_stage_model.transformer.", "text_encoder"), ("text_encoder.", "text_encoder"),
    ("model_ema.", "averaged"),
)  # fmt: skip
"""Prefix of a name -> the group that its tensor belongs to."""
ROOTS: Mapping[str, str] = {
    **dict.fromkeys(("input_blocks", "middle_block", "output_blocks", "time_embed", "out"), "unet"),
    **dict.fromkeys(("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks"), "unet"),
    **dict.fromkeys(("conv_norm_out", "conv_out"), "unet"),
    **dict.fromkeys(("encoder", "decoder", "quant_conv", "post_quant_conv", "loss"), "vae"),
    "text_model": "text_encoder",
}
"""First word of a name without a prefix -> the same."""
LDM_MARKS = {
    "unet": ("input_blocks.", "middle_block.", "output_blocks.", "time_embed."),
    "vae": ("encoder.down.", "decoder.up.", "encoder.mid.", "decoder.mid."),
}
"""Beginnings of names that the LDM layout alone has."""
MARKERS: Mapping[str, tuple[str, str | bool]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("zero_terminal_snr", True),
}
"""A tensor that is there to say something -> what it says."""
AVERAGED_COUNTERS = ("decay", "num_updates")
"""Beside averaged weights; where these were left out, the counters alone may have stayed."""
SCHEDULE_BUFFERS = ("betas", "alphas_cumprod")
PREDICTION_METADATA = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
EMBEDDING_WIDTHS = (768, 1024, 1280)
SD2_WIDTH, SDXL_WIDTHS = 1024, (1280, 2048)
OTHER_MODEL = "name an SD-1.x model"
LATENT_CHANNELS = 4


class Names:
    """The names of a file's tensors with their shapes, for the rows of `KINDS`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
        self.shapes, self.metadata = shapes, metadata

    def begin(self, *prefixes: str) -> bool:
        """Whether a name begins so."""
        return any(name.startswith(prefixes) for name in self.shapes)

    def hold(self, *parts: str) -> bool:
        """Whether a name has one of these in it."""
        return any(part in name for part in parts for name in self.shapes)

    def shape_of(self, *endings: str) -> tuple[int, ...]:
        """The shape of the first tensor with such an ending; empty for none."""
        return next((shape for name, shape in self.shapes.items() if name.endswith(endings)), ())

    @property
    def input_channels(self) -> int:
        """Channels of the input of a UNet; 0 where there is none."""
        is_unet = self.begin("model.diffusion_model.", "diffusion_model.", "input_blocks.", "down_blocks.", "unet.")
        names = [f"{prefix}{inner}" for prefix, group in (*PREFIXES, ("", "unet")) if group == "unet"
                 for inner in ("input_blocks.0.0.weight", "conv_in.weight")]  # fmt: skip
        shape = next((self.shapes[name] for name in names if name in self.shapes), ())
        return shape[1] if is_unet and len(shape) == 4 else 0

    @property
    def context_width(self) -> int:
        """Width of the text that a UNet is conditioned on; 0 where there is none."""
        shape = self.shape_of("attn2.to_k.weight")
        return shape[-1] if len(shape) == 2 else 0

    @property
    def is_embedding(self) -> bool:
        """Whether it may be the vectors of a new word: few, and as wide as a text encoder."""
        widths = [shape[-1] for shape in self.shapes.values() if len(shape) in (1, 2)]
        return 0 < len(self.shapes) == len(widths) <= 4 and all(width in EMBEDDING_WIDTHS for width in widths)


class Kind(NamedTuple):
    """A kind of file that no teacher is made of."""

    description: str
    applies: Callable[[Names], bool]
    remedy: str = OTHER_MODEL


KINDS: Sequence[Kind] = (
    Kind(
        "a LoRA",
        lambda names: names.begin("lora_unet_", "lora_te", "base_model.model.", "lycoris_")
        or names.hold(".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.up.", ".lora.down.", "_lora.up.",
                      "_lora.down.", ".lora_linear_layer.", ".hada_w1", ".lokr_w1", ".oft_blocks"),
        "name the model that it was made for with --teacher, and the LoRA with --teacher.loras '[{file: ...}]'",
    ),
    Kind(
        "a ControlNet",
        lambda names: names.begin("control_model.", "controlnet_", "input_hint_block.", "zero_convs.", "control_")
        or names.hold("controlnet_down_blocks.", "input_hint_block."),
    ),
    Kind("an IP-Adapter", lambda names: names.begin("ip_adapter.", "image_proj.")),
    Kind("a T2I adapter", lambda names: names.begin("adapter.body.", "body.0.block", "body.0.resnets")),
    Kind(
        "a textual inversion (the vectors of a new word)",
        lambda names: names.begin("string_to_param", "string_to_token", "emb_params", "clip_l", "clip_g")
        or names.is_embedding,
    ),
    Kind("a hypernetwork", lambda names: names.begin("320.", "640.", "768.", "1280.")),
    Kind("a motion module of AnimateDiff", lambda names: names.hold("motion_modules.", "temporal_transformer")),
    Kind("an SD3 model", lambda names: names.hold("joint_blocks.", "context_embedder.")),
    Kind("a Flux model", lambda names: names.hold("double_blocks.", "single_transformer_blocks.", "single_blocks.")),
    Kind("a transformer for pictures, not a UNet,", lambda names: names.begin("transformer_blocks.", "transformer.")),
    Kind(
        "an SDXL model",
        lambda names: names.begin("conditioner.") or names.context_width in SDXL_WIDTHS
        or names.hold("label_emb.", "add_embedding."),
    ),
    Kind(
        "an inpainting model (9 input channels)",
        lambda names: names.input_channels == 9,
        "name the plain model that it was made from",
    ),
    Kind(
        "a model of instruct-pix2pix (8 input channels)",
        lambda names: names.input_channels == 8,
        "name the plain model that it was made from",
    ),
    Kind("a depth-to-image model (5 input channels)", lambda names: names.input_channels == 5),
    Kind("an upscaler in latent space (7 input channels)", lambda names: names.input_channels == 7),
    Kind(
        "a model with other input channels than an SD-1.x model's 4",
        lambda names: names.input_channels not in (0, LATENT_CHANNELS),
    ),
    Kind(
        "an SD2 model",
        lambda names: names.begin("cond_stage_model.model.") or names.context_width == SD2_WIDTH,
    ),
    Kind(
        "an upscaler of pictures",
        lambda names: names.begin("conv_first.", "model.0.weight", "model.1.sub.", "body.0.rdb1.", "RRDB_trunk.")
        or names.hold(".rdb1.", ".RDB1.", "params_ema"),
    ),
    Kind(
        "an encoder of pictures",
        lambda names: names.begin("vision_model.", "visual.", "concept_embeds", "special_care_embeds"),
    ),
)  # fmt: skip
"""The first row that applies says what a file is."""
EXPORT_KIND = "a velocity model that sollune exported, and a teacher predicts noise or v"


@dataclass(frozen=True)
class Contents:
    """What a file holds of an SD-1.x model."""

    groups: Mapping[str, Mapping[str, StoredTensor]]
    """Component, or `averaged` -> its tensors, by names without prefix."""
    stated: Mapping[str, str | bool]
    """What markers and metadata say of its prediction and its schedule."""
    buffers: Mapping[str, StoredTensor] = field(default_factory=dict)
    """The tables of its schedule."""

    def is_ldm(self, component: str) -> bool:
        """Whether the tensors of a component have the names of the LDM layout."""
        return any(name.startswith(LDM_MARKS.get(component, ())) for name in self.groups.get(component, ()))


def contents_of(file: TensorFile, subject: str) -> Contents:
    """Sort the tensors of a file; raises `Refused`, beginning with `subject`, for one that is no SD-1.x model."""
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in file.tensors.items()}
    if len(tensors) < len(file.tensors):
        raise Refused(f"{subject}: holds tensors twice, with and without a prefix - keep one of each")
    refuse_other_kinds(tensors, file.metadata, subject)
    groups: dict[str, dict[str, StoredTensor]] = {}
    stated: dict[str, str | bool] = {}
    if (prediction := file.metadata.get("modelspec.prediction_type", "").lower()) in PREDICTION_METADATA:
        stated["prediction_type"] = PREDICTION_METADATA[prediction]
    buffers = {}
    for name, tensor in tensors.items():
        if name in MARKERS:
            key, value = MARKERS[name]
            stated[key] = value
        elif name in SCHEDULE_BUFFERS:
            buffers[name] = tensor
        elif place := group_of(name):
            group, inner = place
            groups.setdefault(group, {})[inner] = tensor
    if groups.get("averaged", {}).keys() <= set(AVERAGED_COUNTERS):
        groups.pop("averaged", None)
    if not groups:
        first = f" ({format_value(next(iter(tensors)))} is its first tensor)" if tensors else " (it has no tensors)"
        raise Refused(f"{subject}: holds nothing of an SD-1.x model{first} - {OTHER_MODEL}")
    return Contents(groups, stated, buffers)


def refuse_other_kinds(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], subject: str) -> None:
    """Raise `Refused` for a file that is one of `KINDS`."""
    if metadata.get("sollune.prediction") == "velocity":
        raise Refused(f"{subject}: is {EXPORT_KIND} - name the teacher that it was made from")
    names = Names({name: tensor.shape for name, tensor in tensors.items()}, metadata)
    if kind := next((kind for kind in KINDS if kind.applies(names)), None):
        raise Refused(f"{subject}: is {kind.description} - {kind.remedy}")


def group_of(name: str) -> tuple[str, str] | None:
    """The group of a tensor, and its name there; None for one that is no part of a model."""
    for prefix, group in PREFIXES:
        if name.startswith(prefix):
            return group, name.removeprefix(prefix)
    group = ROOTS.get(name.partition(".")[0], "")
    return (group, name) if group else None
