"""The pooled feature of each of up to nine blocks: the output of its last resnet, averaged over height and width."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

HOOK_POINT = "last resnet of each block, spatial mean, fp32"


def last_resnets(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """Block name -> its last resnet, in the order in which they run; a pruned block without one is left out."""
    blocks = {f"down_{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {"mid": unet.mid_block} if unet.mid_block is not None else {}
    blocks |= {f"up_{i}": block for i, block in enumerate(unet.up_blocks)}
    return {name: block.resnets[-1] for name, block in blocks.items() if len(block.resnets)}


def feature_widths(unet: UNet2DConditionModel) -> dict[str, int]:
    """Block name -> number of channels of its pooled feature."""
    return {name: len(resnet.get_parameter("conv2.weight")) for name, resnet in last_resnets(unet).items()}


def with_settings(config: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """A diffusers config with these settings.

    A loaded config lists the keys that its file was silent of, and `from_config` ignores whatever stands there.
    """
    return {key: value for key, value in config.items() if key != "_use_default_values"} | settings


def copy_without_hooks(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy in fp32 on the same device, without forward hooks."""
    with unet.device:  # there, because a CPU takes seconds to draw the first weights, which are overwritten
        copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    return copy.float().to(unet.device)


class FeatureTap:
    """Records the pooled features of a UNet's forward passes.

    It records from the begin of a pass until `pop_features`: with gradient checkpointing the resnets run again in the
    backward pass, and recording there would only keep activations alive.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._features: dict[str, Tensor] = {}
        self._recording = False
        unet.register_forward_pre_hook(self._start_recording)
        for name, resnet in last_resnets(unet).items():
            resnet.register_forward_hook(partial(self._record, name))

    def pop_features(self, rows: slice) -> Mapping[str, Float[Tensor, "b n"]]:
        """Pooled features of these rows of the latest forward pass, in fp32; the tap is empty afterwards."""
        features, self._features, self._recording = self._features, {}, False
        return {name: feature[rows] for name, feature in features.items()}

    def _start_recording(self, *_: object) -> None:
        self._recording = True

    def _record(self, name: str, _resnet: nn.Module, _inputs: object, output: Float[Tensor, "b n h w"]) -> None:
        if self._recording:
            self._features[name] = output.mean(dim=(2, 3), dtype=torch.float32)
