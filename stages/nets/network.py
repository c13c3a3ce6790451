"""A teacher's UNet in one precision, asked for both branches of guidance in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.refusal import Refused
from stages.flow.bridge import Bridge
from stages.nets.features import FeatureTap, unheard

MOST_AMPLIFIED = 4.34
"""The bridge multiplies an error of the network by 1 / (1 - s). Beyond this the 1e-3 of half precision would be up to
1 % of the velocity, so those steps are asked in full: SD-1.x's from k = 701 on, where it is 4.35 to 16."""


def precise(bridge: Bridge, k: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Which of these steps are asked in the full precision of the weights."""
    return k > last_in_lower(bridge)


def last_in_lower(bridge: Bridge) -> int:
    """The last step of a schedule at which a lower precision is precise enough."""
    return int((1 / (1 - bridge.s_table) <= MOST_AMPLIFIED).sum()) - 1


def precision_of(dtype: torch.dtype, bridge: Bridge) -> str:
    """A precision as a recipe tells it."""
    name = str(dtype).removeprefix("torch.")
    return name if dtype == torch.float32 else f"{name}, float32 above k = {last_in_lower(bridge)}"


@dataclass(frozen=True)
class Said:
    """Raw answers of both branches in fp32, and the pooled features of the conditional one."""

    cond: Float[Tensor, "b c h w"]
    uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class Network:
    """A frozen UNet that listens to its own blocks."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype, compiled: bool) -> None:
        """A copy is made where `unet` is of another dtype; on a GPU it is laid out for its convolutions."""
        self.unet = unet if unet.dtype == dtype else _lowered(unet, dtype)
        self.dtype = dtype
        if self.unet.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.tap = FeatureTap(self.unet)
        self._forward: Any = torch.compile(self.unet) if compiled else self.unet

    def ask(
        self,
        shown: Float[Tensor, "b c h w"],
        k: Int[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> Said:
        """What it answers when it is shown these states at these steps."""
        both = torch.cat([cond, uncond.expand_as(cond)]).to(self.dtype)
        raw = self._forward(shown.to(self.dtype).repeat(2, 1, 1, 1), k.repeat(2), both).sample.float()
        said_cond, said_uncond = raw.chunk(2)
        return Said(said_cond, said_uncond, self.tap.take(slice(0, len(shown))))


def _lowered(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """A copy in another precision; raises `Refused` for a weight that is too large for it."""
    lower = unheard(unet).to(dtype).eval().requires_grad_(False)
    for name, value in lower.state_dict().items():
        if not bool(value.isfinite().all()):
            kind = str(dtype).removeprefix("torch.")
            raise Refused(f"teacher: unet: tensor {name} is too large for {kind} - set dtype to float32 (--dtype)")
    return lower


def joined(parts: Sequence[Said], rows: Int[Tensor, " b"]) -> Said:
    """The answers of several networks, back in the order of the batch: row i of all parts is row `rows[i]` of it."""
    back = rows.argsort()

    def one(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[back]

    features = {block: one([part.features[block] for part in parts]) for block in parts[0].features}
    return Said(one([part.cond for part in parts]), one([part.uncond for part in parts]), features)
