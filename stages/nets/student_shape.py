"""What a distilled student is made of: the teacher's UNet, or fewer of its layers, with its weights or random ones.

Fewer layers as in BK-SDM (Kim et al. 2023, arXiv:2305.15798): `small` is its Base, `tiny` its Small.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from diffusers import UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.values import Strict
from stages.flow.bridge import Bridge
from stages.nets.features import last_resnets, with_settings
from stages.nets.student import Student, Target
from stages.prompts import derived_seed
from stages.system.refusal import Refused

Prune: TypeAlias = Literal["none", "small", "tiny"]
"""Which layers of the teacher a student is made without."""

DEFAULT_LAYERS, DEFAULT_MID = 2, "UNetMidBlock2DCrossAttn"
"""What a config that is silent means in diffusers."""
LDM_FACT = "fits_ldm"
"""The fact of an export of a pruned student whether the LDM layout can hold it."""
COUNTED_TOKENS = 77
"""Length of the conditioning at which multiply-adds are counted."""


class StudentConfig(Strict):
    """The student before its first step."""

    prune: Prune = Field(
        "none",
        description="layers that it is made without: small: a resnet, with its attention, of each down and each up "
        "block (BK-SDM-Base); tiny: the mid block as well (BK-SDM-Small); the others begin as the teacher's",
    )
    scratch: bool = Field(
        False, description="begin with random weights (of train.seed) in place of the teacher's, and without a graft"
    )

    def identity(self) -> dict[str, Any]:
        """What a run's identity holds of it: nothing for the teacher's whole UNet, as before there was a choice."""
        return {} if self == StudentConfig() else {"student": self.model_dump(mode="json")}

    def grafts(self, graft: bool | None, target: Target) -> bool:
        """Whether the time embedding is grafted: as configured, else where the graft means something."""
        return target == "velocity" and not self.scratch if graft is None else graft

    def make(self, teacher: UNet2DConditionModel, vp_bridge: Bridge | None, seed: int) -> Student:
        """The student in fp32 on the teacher's device, trainable; the teacher stays as it is."""
        unet = prune_unet(teacher, self.prune)
        return Student.from_teacher(random_unet(unet, seed) if self.scratch else unet, vp_bridge)


def prune_unet(teacher: UNet2DConditionModel, prune: Prune) -> UNet2DConditionModel:
    """A copy in fp32 without the layers that `prune` names, its weights the teacher's; for `none` the teacher itself.

    Only configs of stock diffusers are made. Of L + 1 up layers the second goes, so that the others keep their skip
    connections but for the first one's; BK-SDM's choice at L = 2.
    """
    if prune == "none":
        return teacher
    pruned = UNet2DConditionModel.from_config(pruned_config(teacher.config, prune))
    own, weights = pruned.state_dict(), teacher.state_dict()
    sources = _up_sources(_layers_of(teacher.config), _layers_of(pruned.config), weights, own)
    pruned.load_state_dict({name: weights[_source_name(name, sources)] for name in own})
    return pruned.float().to(teacher.device)


def pruned_config(config: Mapping[str, Any], prune: Prune) -> dict[str, Any]:
    """The config of a UNet without the layers that `prune` names."""
    if prune == "none":
        return dict(config)
    kept = kept_layers(config)
    mid = {"mid_block_type": None} if prune == "tiny" else {}
    return with_settings(config, layers_per_block=kept[0] if len(set(kept)) == 1 else kept, **mid)


def prune_of(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> Prune:
    """What a student of this config is made without; raises `Refused` where it is no student of such a teacher."""
    prunes: tuple[Prune, ...] = get_args(Prune)
    for prune in prunes:
        if shape_settings(pruned_config(teacher, prune)) == shape_settings(student):
            return prune
    shapes = [", ".join(f"{key} {value}" for key, value in shape_settings(one).items()) for one in (student, teacher)]
    raise Refused(f"student: has {shapes[0]}, its teacher {shapes[1]}, which no pruning gives - name its own teacher")


def refuse_pruned(folder: Path, prune: Prune, purpose: str) -> None:
    """Raise `Refused` for a run whose student lacks layers of its teacher, which `purpose` needs."""
    if prune != "none":
        raise Refused(
            f"{folder}: its student is pruned ({prune}), and {purpose} needs all layers of its teacher - name a run "
            "without student.prune"
        )


def kept_layers(config: Mapping[str, Any]) -> list[int]:
    """Resnets of each down block after pruning: one fewer, but none taken that changes the number of channels."""
    widths: Sequence[int] = config["block_out_channels"]
    least = [int(width != before) for before, width in zip([widths[0], *widths], widths, strict=False)]
    return [max(count - 1, floor) for count, floor in zip(_layers_of(config), least, strict=True)]


def random_unet(unet: UNet2DConditionModel, seed: int) -> UNet2DConditionModel:
    """The same network on the same device with the library's initial weights, drawn with this seed."""
    with torch.random.fork_rng(devices=[]):
        # The library draws from the global generator alone.
        torch.default_generator.manual_seed(derived_seed("scratch", seed))
        fresh = UNet2DConditionModel.from_config(unet.config)
    return fresh.float().to(unet.device)


def shape_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a UNet's config that pruning changes, as JSON has them."""
    layers, mid = config.get("layers_per_block", DEFAULT_LAYERS), config.get("mid_block_type", DEFAULT_MID)
    return {"layers_per_block": layers if isinstance(layers, int) else list(layers), "mid_block_type": mid}


def fits_ldm(unet_config: Mapping[str, Any]) -> bool:
    """Whether the LDM layout can hold a UNet: with as many layers in each block, and a middle block."""
    layers, mid = shape_settings(unet_config).values()
    return isinstance(layers, int) and mid is not None


def gone_blocks(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> list[str]:
    """The blocks that a student has no resnet of, so that they have no feature."""
    return [block for block in last_resnets(teacher) if block not in last_resnets(student)]


def cost_text(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> str:
    """Parameters and multiply-adds of a pruned student, and the blocks without features, on one line."""
    parameters, own = count_parameters(teacher), count_parameters(student)
    share = multiply_adds(student.config) / multiply_adds(teacher.config)
    gone = gone_blocks(teacher, student)
    without = f"; no block term and no David for {', '.join(gone)}, whose resnets are gone" if gone else ""
    return f"{own} of {parameters} parameters ({own / parameters:.2f}), {share:.2f} of the multiply-adds{without}"


def count_parameters(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(config: Mapping[str, Any]) -> int:
    """Multiply-adds of one pass of one latent of the model's own size, from its config alone."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel.from_config(config)
        side = config["sample_size"]
        x = torch.zeros(1, config["in_channels"], side, side)
        unet(x, torch.zeros(1), torch.zeros(1, COUNTED_TOKENS, config["cross_attention_dim"]))
    return int(counter.get_total_flops()) // 2


def _layers_of(config: Mapping[str, Any]) -> list[int]:
    layers = shape_settings(config)["layers_per_block"]
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)


def _up_sources(
    layers: Sequence[int], kept: Sequence[int], teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]
) -> list[list[int]]:
    """For each up block the teacher's layer of each layer of the student."""
    sources = []
    for number, (before, after) in enumerate(zip(reversed(layers), reversed(kept), strict=True)):
        own = [0, *range(2, before + 1)] if after < before else list(range(before + 1))
        if after < before and after == 0:
            # One of two is left. The last has its own skip connection, where it takes what comes from the block before.
            first = f"up_blocks.{number}.resnets.0.conv1.weight"
            last = f"up_blocks.{number}.resnets.{before}.conv1.weight"
            own = [before if teacher[last].shape == student[first].shape else 0]
        sources.append(own)
    return sources


def _source_name(name: str, sources: Sequence[Sequence[int]]) -> str:
    """The teacher's name of a student's tensor."""
    words = name.split(".")
    if words[0] == "up_blocks" and words[2] in ("resnets", "attentions"):
        words[3] = str(sources[int(words[1])][int(words[3])])
    return ".".join(words)
